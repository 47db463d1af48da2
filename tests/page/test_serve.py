"""`lumina-mgpt serve` with the page."""

import re
import signal
import subprocess
import sys

import pytest
from commands import ROOT, environment, line_of
from page_runs import shown
from server_runs import PATIENCE


@pytest.mark.slow
def test_the_command_serves_the_page_and_ends_while_it_is_open(desktop, tiny_checkpoint):
    line = line_of("serve", "--model_path", tiny_checkpoint, "--device", "cpu", "--port", 0)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, env=environment(), text=True, **pipes) as running:
        try:
            url = re.search(r"http://\S+?(?=;)", running.stdout.readline())[0]
            with shown(desktop, None, url) as page:
                page.type("a cat on a white background")
                page.run("done")
                assert f"--model_path {tiny_checkpoint} --device cpu" in page.command()
                running.send_signal(signal.SIGINT)
                assert running.wait(PATIENCE) == 130
            assert "Traceback" not in running.stderr.read()
        finally:
            running.kill()


def test_without_gradio_the_server_has_no_page(tiny_checkpoint, monkeypatch, capsys):
    from lumina_mgpt.cli import serve

    for name in [name for name in sys.modules if name.startswith("lumina_mgpt.page.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert serve._page(serve.build_parser().parse_args([]), None) is None
    assert "lumina-mgpt[page]" in capsys.readouterr().err
