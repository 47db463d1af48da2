"""A folder of pictures as a record file: captions lie beside the pictures, or in them."""

from pathlib import Path

from PIL import Image

from lumina_mgpt.data.archive import PICTURES
from lumina_mgpt.errors import InputError


def read_folder(path: str | Path) -> list[dict]:
    """Records in the forms of `records.parse_record`, one for each picture in the folder and those below it, by name.

    The prompt is what `cat.txt` beside `cat.png` says; without such a file, the `prompt` that generate.py writes into
    its pictures. Where there is neither, that is for `parse_record` to name.

    Raises:
        InputError: there is no picture.
    """
    pictures = sorted(file for file in Path(path).rglob("*") if file.suffix[1:].lower() in PICTURES and file.is_file())
    if not pictures:
        raise InputError(f"--in_filename {path} is a folder without pictures; put {', '.join(sorted(PICTURES))} files "
                         "there, each with its caption in a .txt file of the same name")  # fmt: skip
    return [{"image_path": str(picture)} | _prompt(picture) for picture in pictures]


def _prompt(picture: Path) -> dict:
    try:
        return {"prompt": picture.with_suffix(".txt").read_text(encoding="utf-8").strip()}
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError):
        return {}
    try:
        with Image.open(picture) as image:  # reads the head alone
            return {"prompt": image.info["prompt"]} if "prompt" in image.info else {}
    except Exception:  # a picture that cannot be opened is named when it is tokenized
        return {}
