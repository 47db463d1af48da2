"""GRPO on a model whose 81 images can be enumerated: gradients, the optimum, constant rewards, resuming."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from enumerable import IMAGES, remember, wanted_codes, write_checkpoint
from safetensors.torch import load_file
from training_runs import ONE, ROOT, environment, metrics_of, weights_of

from lumina_mgpt.cli import grpo as command
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.results import Result
from lumina_mgpt.scoring import bayes_score, read_score
from lumina_mgpt.training.export import export_checkpoint
from lumina_mgpt.training.grpo import GrpoTrainer
from lumina_mgpt.training.grpo_objective import PolicyModel, advantages, image_inputs, policy_terms, process_advantages
from lumina_mgpt.training.grpo_options import GrpoConfig
from lumina_mgpt.training.grpo_prompts import PromptFeed
from lumina_mgpt.unirep import ImageLayout, encode_image
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

STEPS = 40
PROMPT = [1, 5, 9, 12]  # ids of a prompt; the model is random


@pytest.fixture(scope="session")
def enumerable(tmp_path_factory, tiny_checkpoint, oracle_v1_checkpoint):
    folder = tmp_path_factory.mktemp("enumerable") / "checkpoint"
    write_checkpoint(folder, tiny_checkpoint, oracle_v1_checkpoint("image") / "vqgan.safetensors")
    remember(ImageTokenizer.from_checkpoint(folder / "vqgan.safetensors"))
    return folder


@pytest.fixture
def make(enumerable, tmp_path):
    """Options -> configuration of a run of four steps in float32."""

    def config(rewards=("enumerable:wanted_codes",), speculation=None, **values) -> GrpoConfig:
        usual = dict(
            prompt_file=str(enumerable / "prompts.txt"),
            init_from=str(enumerable),
            output_dir=str(tmp_path / "run"),
            groups=2,
            group_size=4,
            max_steps=4,
            lr=1e-3,
            precision="fp32",
            device="cpu",
            save_iteration_interval=0,
        )
        return GrpoConfig.of(rewards, speculation, **usual | values)

    return config


@pytest.fixture(scope="module")
def small(enumerable):
    """The model in float64, and the layout of its images."""
    model = load_model(enumerable, torch.float64, "cpu")
    return model, ImageLayout(Vocabulary.from_folder(enumerable, model.config), 1, 1)


def image_log_probs(model, layout, start, cfg=1.0, temperature=1.0, grids=IMAGES) -> torch.Tensor:
    """log P of each code of some images, (images, 4), with gradient: one plain forward per image and pass."""
    columns, result = layout.vocabulary.code_slice, []
    for grid in grids:
        ids = encode_image(grid, layout.vocabulary)
        passes = []
        for prompt in (start, []):
            row = torch.tensor([[*prompt, *ids]])
            places = torch.tensor([len(prompt) + at for at, id_ in enumerate(ids) if id_ >= columns.start])
            passes.append(model.project(model(row)[0, places - 1])[:, columns])
        logits = passes[1] + cfg * (passes[0] - passes[1])
        result.append((logits / temperature).log_softmax(-1).gather(1, grid.view(-1, 1))[:, 0])
    return torch.stack(result)


def gradients(model, loss) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [part if part is not None else torch.zeros(()) for part in found]


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, temperature", [(1.0, 1.0), (3.0, 0.7)])
def test_the_gradient_is_that_of_the_enumerated_expectation(small, monkeypatch, cfg, temperature):
    """Each image weighted by its probability: the objective's gradient is that of sum over images of P · reward."""
    model, layout = small
    rewards = torch.randn(81, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    enumerated = image_log_probs(model, layout, PROMPT, cfg, temperature)  # (81, 4)
    probs = enumerated.sum(1).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-9)
    wanted = gradients(model, -(probs * rewards).sum())

    settings = SamplingConfig(cfg=cfg, temperature=temperature, top_k=3)
    inputs, columns = image_inputs([PROMPT] * 81, IMAGES, layout, cfg != 1.0), layout.vocabulary.code_slice
    for limit in (1 << 25, 0):  # whole, and in chunks of logits
        monkeypatch.setattr("lumina_mgpt.training.grpo_objective.WHOLE_LOGITS", limit)
        monkeypatch.setattr("lumina_mgpt.training.grpo_objective.CHUNK_LOGITS", 50)
        now, entropy = PolicyModel(model)(*inputs, settings, columns)
        torch.testing.assert_close(now.view(81, 4), enumerated, rtol=0, atol=1e-10)
        weights = (probs.detach() * rewards).repeat_interleave(4)
        terms = policy_terms(now, now.detach(), None, weights)
        torch.testing.assert_close(gradients(model, terms.loss), wanted, rtol=1e-7, atol=1e-12)
    first = enumerated[::27, 0].detach()  # of the three values of the first code
    assert entropy[0].item() == pytest.approx(-(first.exp() * first).sum().item(), abs=1e-10)


def test_the_gradient_of_process_supervision_is_that_of_the_sum(small):
    """All images at once, weighted by their probabilities: the means that are subtracted change nothing."""
    model, layout = small
    rewards = torch.randn(1, 81, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards = rewards.view(3, 3, 3, 3, 4)
    for code in range(4):  # the reward of a code may depend on the codes up to it
        rewards[..., code] = rewards[..., code].mean(tuple(range(code + 1, 4)), keepdim=True)
    rewards = rewards.reshape(1, 81, 4)
    wanted = gradients(model, -(image_log_probs(model, layout, PROMPT).sum(1).exp() * rewards[0].sum(1)).sum())
    logs = image_log_probs(model, layout, PROMPT)
    weights = logs.detach().sum(1).exp()[:, None] * process_advantages(rewards, "mean")[0]
    terms = policy_terms(logs.flatten(), logs.detach().flatten(), None, weights.flatten())
    torch.testing.assert_close(gradients(model, terms.loss), wanted, rtol=1e-7, atol=1e-12)


def test_the_divergence_and_its_gradient():
    """The expectation of the estimate is KL(policy || reference), and its gradient on the codes is 1 - q / p."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    now, reference = logits.log_softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    probs, zero = now.exp().detach(), torch.zeros(3, dtype=torch.float64)
    each = [
        policy_terms(now[n : n + 1], now[n : n + 1].detach(), reference[n : n + 1], zero[:1], kl=2.0) for n in (0, 1, 2)
    ]
    mean = sum(p * terms.kl for p, terms in zip(probs, each, strict=True))
    assert mean.item() == pytest.approx((probs * (now - reference)).sum().item(), abs=1e-12)
    for n, terms in enumerate(each):
        ratio = (reference[n] - now[n]).exp().detach()
        found, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (terms.loss, now[n]))
        torch.testing.assert_close(found, 2 * (1 - ratio) * wanted)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, clipped",
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.25, 2.0, -2.5, -2.5, 0),
        (1.4, 2.0, -2.6, 0.0, 1),  # above 1 + 0.3
        (1.4, -2.0, 2.8, 2.8, 0),
        (0.7, 2.0, -1.4, -1.4, 0),
        (0.7, -2.0, 1.6, 0.0, 1),  # below 1 - 0.2
    ],
)
def test_ratios_are_clipped_where_more_would_earn_more(ratio, advantage, loss, slope, clipped):
    before = torch.tensor([-1.5], dtype=torch.float64)
    now = (before + math.log(ratio)).requires_grad_()
    terms = policy_terms(now, before, None, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.3)
    terms.loss.backward()
    assert (terms.loss.item(), now.grad.item()) == pytest.approx((loss, slope)) and terms.clipped == clipped


def test_advantages_compare_within_a_group():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [0.1, 0.1, 0.1]], dtype=torch.float64)
    assert advantages(rewards, "mean").tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    found = advantages(rewards)
    assert found[0].tolist() == pytest.approx([-1, 1, 0], abs=1e-3) and not found[1].any()
    for scale in ("std", "mean"):  # images of one code
        torch.testing.assert_close(process_advantages(rewards[..., None], scale)[..., 0], advantages(rewards, scale))


@pytest.mark.parametrize("discount, second", [(1.0, 3.0), (0.5, 2.0), (0.0, 1.0)])
def test_advantages_of_codes_count_later_rewards(discount, second):
    """The group's mean is taken at each code, so that a reward which all images have at a code changes nothing."""
    rewards = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]], [[1.0, 5.0, 7.0]] * 2], dtype=torch.float64)
    found = process_advantages(rewards, "mean", discount)
    wanted = torch.tensor([discount * second, second, 2.0], dtype=torch.float64) / 2
    torch.testing.assert_close(found[0], torch.stack([wanted, -wanted]))
    assert not found[1].any()
    again = process_advantages(rewards + torch.tensor([3.0, -1.0, 5.0]), "mean", discount)
    torch.testing.assert_close(again, found)
    scaled = process_advantages(rewards, "std", discount)
    assert scaled[0].square().sum().item() == pytest.approx(3, rel=1e-3) and not scaled[1].any()


@pytest.mark.parametrize("discount", [None, 0.0, 0.5])
def test_a_step_has_the_gradient_of_the_formula(make, monkeypatch, discount):
    """Two updates of a step with guidance: the first gradient is the mean over images and codes of -A · d log p.

    With a discount, A is that of each code: of its share of Bayes' reading, and of those of the codes after it.
    """
    config = make(cfg=2.0, groups=2, group_size=6, batch_size=5, clip_grad=0.0, kl=0.0, lr=1e-9, max_steps=1)
    if discount is not None:
        process = dict(supervision="process", discount=discount, advantage="mean")
        config = make(
            ("bayes",), **process, cfg=2.0, group_size=6, batch_size=5, clip_grad=0.0, kl=0.0, lr=1e-9, max_steps=1
        )
    trainer = GrpoTrainer(config, ONE)
    drawn, seen = [], []
    draw, update = trainer.sampler.draw, trainer._update
    monkeypatch.setattr(trainer.sampler, "draw", lambda *args: drawn.append(draw(*args)) or drawn[0])

    def note():
        seen.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
        update()

    monkeypatch.setattr(trainer, "_update", note)
    initial = load_model(config.training.model.init_from, torch.float32, "cpu")
    trainer.run()
    (groups,) = drawn
    pictures = trainer.sampler.decode(groups.codes)
    rewards = torch.tensor(wanted_codes(pictures, groups.prompts), dtype=torch.float64).view(2, 6)
    layout, loss = trainer.dataset.layout, torch.zeros(())
    scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    wanted_advantages = scaled.view(12, 1).expand(12, 4)
    if discount is not None:
        with torch.no_grad():
            shares = [
                image_log_probs(initial, layout, list(start), 1.0, grids=grid[None])[0]
                - image_log_probs(initial, layout, list(start), 0.0, grids=grid[None])[0]
                for start, grid in zip(groups.starts, groups.codes, strict=True)
            ]
        powers = torch.tensor([[discount ** max(0, j - t) if j >= t else 0.0 for j in range(4)] for t in range(4)])
        returns = (torch.stack(shares) @ powers.T).view(2, 6, 4)
        wanted_advantages = (returns - returns.mean(1, keepdim=True)).view(12, 4)
    for start, grid, advantage in zip(groups.starts, groups.codes, wanted_advantages, strict=True):
        logs = image_log_probs(initial, layout, list(start), 2.0, grids=grid[None])
        loss = loss - (advantage.float() * logs[0]).sum() / 48
    wanted = gradients(initial, loss)
    scale = max(part.abs().max() for part in wanted)
    for found, part in zip(seen[0], wanted, strict=True):
        assert (found - part).abs().max() < 1e-4 * scale


# -- runs --------------------------------------------------------------------------------------------------------------


def expected_reward(folder, prompt: str) -> float:
    """The enumerated expectation of the reward of a checkpoint's images for a prompt. Its maximum is 1."""
    pipeline = Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    prepared = pipeline.checkpoint.prepare(GenerationRequest.of(prompt, cfg=1.0))
    with torch.no_grad():
        logs = image_log_probs(pipeline.model, prepared.layout, prepared.starts[0])
    code = 0 if "dark" in prompt else 2
    return float((logs.sum(1).exp() * (IMAGES == code).flatten(1).float().mean(1)).sum())


def test_the_expected_reward_rises_to_the_optimum(make, enumerable):
    """Opposite rewards for two prompts, so that the model must read the prompt."""
    config = make(max_steps=STEPS, lr=1e-2, groups=2, group_size=8, kl=0.0, sample_every=STEPS, updates=2)
    GrpoTrainer(config, ONE).run()
    export = export_checkpoint(config.training.output_dir, dtype="fp32")
    for prompt in ("a bright square", "a dark square"):
        before, after = (expected_reward(folder, prompt) for folder in (enumerable, export))
        assert before < 0.5 and after > 0.97, (prompt, before, after)
    rows = metrics_of(config.training.output_dir)
    assert rows[-1]["reward"] > rows[0]["reward"] and rows[-1]["entropy"] < rows[0]["entropy"]
    seconds = [rows[-1][f"seconds_{part}"] for part in ("sampling", "scoring", "learning")]
    assert min(seconds) >= 0 and rows[-1]["images"] == 16 * STEPS and any(row["clipped"] for row in rows)
    samples = Path(config.training.output_dir) / "samples" / f"step-{STEPS:08d}"
    assert {path.name for path in samples.iterdir()} == {"0.png", "1.png", "groups.png"}


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 2}])
def test_a_constant_reward_changes_nothing(make, enumerable, adapters):
    config = make(("enumerable:constant",), lr=1e-2, updates=2, **adapters)
    trainer = GrpoTrainer(config, ONE)
    assert (trainer.reference is None) == bool(adapters)  # with adapters, the base is the reference
    trainer.run()
    rows = metrics_of(config.training.output_dir)
    assert all(row["equal_groups"] == 1 and row["kl"] == row["clipped"] == row["grad_norm"] == 0 for row in rows)
    before, after = load_file(enumerable / "model.safetensors"), weights_of(config.training.output_dir)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


CASES = {
    "all weights": {"updates": 2, "ema": 0.9, "own": True},
    "process supervision": {"supervision": "process", "discount": 0.5, "only": "bayes"},
    "adapters, guided, speculative": {"lora_rank": 2, "cfg": 2.0, "speculation": Speculation("maximal", 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path, case):
    values = dict(CASES[case])
    rewards = ("enumerable:wanted_codes", *(["own=0.1"] if values.pop("own", False) else []))
    if "only" in values:
        rewards = (values.pop("only"),)
    speculation = values.pop("speculation", None)
    whole = make(rewards, speculation, output_dir=str(tmp_path / "whole"), **values)
    GrpoTrainer(whole, ONE).run()
    part = make(
        rewards, speculation, output_dir=str(tmp_path / "part"), save_iteration_interval=2, keep_checkpoints=9, **values
    )
    GrpoTrainer(part, ONE).run()
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000004")
    resumed = make(rewards, speculation, output_dir=str(tmp_path / "part"), resume="auto", **values)
    GrpoTrainer(resumed, ONE).run()
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "part")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = [metrics_of(tmp_path / name) for name in ("whole", "part")]
    for name in ("step", "epoch", "reward", "kl", "loss", "entropy", "lr", "clipped"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], name
    assert any(row["kl"] > 0 for row in rows[0])
    with pytest.raises(InputError, match="of a run with another value: kl"):
        GrpoTrainer(make(rewards, speculation, output_dir=str(tmp_path / "part"), resume="auto", kl=0.5, **values), ONE)


def test_speculation_with_common_noise_trains_the_same(make, tmp_path):
    rows = []
    for speculation in (None, Speculation("noise", 3)):
        config = make(speculation=speculation, output_dir=str(tmp_path / str(speculation is None)))
        GrpoTrainer(config, ONE).run()
        rows.append(metrics_of(config.training.output_dir))
    assert [row["reward"] for row in rows[0]] == [row["reward"] for row in rows[1]]
    assert rows[0][0]["codes_per_forward"] == 1 < rows[1][0]["codes_per_forward"]


def test_own_rewards_are_those_of_the_frozen_reference(make, enumerable):
    """In batches, with several prompts, and after an update of the model: the scores of `scoring` on the base."""
    trainer = GrpoTrainer(make(("bayes", "reading"), max_steps=1, lr=1e-2, batch_size=3, lora_rank=2), ONE)
    trainer.run()
    groups = trainer.sampler.draw(trainer.model, [1, 0], "key")
    scores, _ = trainer._score(groups)
    pipeline = Pipeline.from_pretrained(enumerable, device="cpu", dtype="fp32", text=True)
    for number in range(len(groups.codes)):
        prepared = pipeline.checkpoint.prepare(GenerationRequest.of(groups.prompts[number], cfg=1.0))
        grid = groups.codes[number]
        result = Result(prepared.request.jobs[0], 0, None, grid, encode_image(grid, pipeline.checkpoint.vocabulary), 1)
        wanted = [score(pipeline, prepared, result) for score in (bayes_score, read_score)]
        assert scores[number].tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_process_supervision_raises_the_reading_of_the_base(make, enumerable, small, discount):
    """The enumerated expectation of log P(prompt | image), less a constant, by the weights before the training."""
    config = make(
        ("bayes",), supervision="process", discount=discount, kl=0.0, groups=2, group_size=8, max_steps=STEPS, lr=1e-2
    )
    trainer = GrpoTrainer(config, ONE)
    trainer.run()
    model, layout = small
    for start in map(list, trainer.dataset.starts):
        with torch.no_grad():
            given, alone = (image_log_probs(model, layout, start, cfg).sum(1) for cfg in (1.0, 0.0))
            after = image_log_probs(trainer.model.double(), layout, start).sum(1)
        gains = [float((logs.exp() * (given - alone)).sum()) for logs in (given, after)]
        best = float((given - alone).max())
        assert gains[1] > gains[0] + 0.5 * (best - gains[0]), (gains, best)
    rows = metrics_of(config.training.output_dir)
    assert rows[-1]["reward"] > rows[0]["reward"] + 1 and rows[0]["equal_groups"] == 0


@pytest.mark.slow
def test_the_command_of_the_document_runs(tmp_path):
    """With one step; on the demo, with its own reading as the reward."""
    text = (ROOT / "TRAIN.md").read_text().split("## Learning from rewards")[1]
    (block,) = [part for part in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "work/rewards" in part]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "lumina-mgpt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lumina_mgpt "$@"\n')
    program.chmod(0o755)
    env = environment() | {"STEPS": "1", "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "work/rewards/run/export/model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_train_as_one(make, enumerable, tmp_path):
    """Sharded weights, half of the groups each: the same images, and equal weights within rounding."""
    results = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = f"--prompt_file {enumerable}/prompts.txt --init_from {enumerable} --output_dir {out} --groups 2"
        options += (
            " --group_size 4 --max_steps 3 --lr 1e-3 --precision fp32 --device cpu --updates 2 --export_dtype fp32"
        )
        options += " --reward enumerable:wanted_codes --reward own=0.1 --ema 0.5"
        start = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        env = environment()
        env["PYTHONPATH"] = f"{ROOT / 'tests'}:{env['PYTHONPATH']}"
        line = [sys.executable, *start, "-m", "lumina_mgpt", "grpo", *options.split()]
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[processes] = load_file(out / "export" / "model.safetensors"), metrics_of(out)
    for first, second in zip(results[1][1], results[2][1], strict=True):
        for name in ("reward", "reward own", "kl", "loss", "entropy", "reward_std"):
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
    for name, weight in results[1][0].items():
        torch.testing.assert_close(results[2][0][name], weight, rtol=0, atol=2e-4)


# -- options and errors ------------------------------------------------------------------------------------------------


def test_prompts_are_taken_once_an_epoch():
    feed = PromptFeed(5, 3, seed=1)
    taken = [index for _ in range(5) for index in feed.next_step()]
    assert [sorted(taken[at : at + 5]) for at in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert taken[:5] != taken[5:10] and (feed.epoch, feed.done, feed.epochs) == (3, 0, 3.0)
    again = PromptFeed(5, 3, seed=1)
    again.epoch, again.done = 1, 1  # after two steps
    assert again.next_step() == taken[6:9]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rewards": ()}, "reward is missing; give own, or module:function"),
        ({"rewards": ("own=x",)}, "reward must be NAME or NAME=WEIGHT with a finite weight"),
        ({"rewards": ("own=0",)}, "other than 0, got 'own=0'"),
        ({"rewards": ("own", "own=2")}, "reward own is given 2 times"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"cfg": 0.0}, "cfg must be above 0"),
        ({"clip": 1.0}, r"clip must be in \[0, 1\)"),
        ({"supervision": "process"}, "reward must be bayes with supervision=process.*got enumerable:wanted_codes"),
        ({"supervision": "process", "rewards": ("own",)}, "reward must be bayes .*got own"),
        ({"discount": 0.5}, "discount has no effect without supervision=process; add that"),
        ({"init_from": None}, "init_from is missing"),
    ],
)
def test_wrong_options_are_refused(make, values, message):
    with pytest.raises(InputError, match=message):
        make(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rewards": ("no_such_module:score",)}, "reward .*cannot import no_such_module"),
        ({"rewards": ("enumerable:write_checkpoint",)}, "reward enumerable:write_checkpoint raised TypeError"),
        ({"rewards": ("speed",)}, "reward must be own, reading, bayes or module:function, got 'speed'"),
        ({"prompt_file": "missing.txt"}, "prompt_file missing.txt"),
        ({"width": 40}, "width must be a multiple of 32"),
    ],
)
def test_unusable_inputs_are_refused_before_training(make, values, message):
    with pytest.raises(InputError, match=message):
        GrpoTrainer(make(**values), ONE)


def test_groups_are_divided_among_processes(make):
    from lumina_mgpt.training.distributed import Processes

    with pytest.raises(InputError, match="groups must be a multiple of the 3 processes, got 2; use 6"):
        GrpoTrainer(make(), Processes(1, 3, torch.device("cpu")))


def test_the_command_trains_and_exports(enumerable, tmp_path, capsys):
    options = f"--prompt_file {enumerable}/prompts.txt --init_from {enumerable} --output_dir {tmp_path}/run --groups 1"
    options += " --group_size 2 --max_steps 1 --precision fp32 --device cpu --reward enumerable:wanted_codes=2"
    assert command.main(options.split()) == 0 and (tmp_path / "run/export/config.json").exists()
    assert (
        command.main([*options.split(), "--resume", "auto", "--export_only", "--export_dir", str(tmp_path / "x")]) == 0
    )
    state = json.loads((tmp_path / "run/checkpoints/step-00000001/trainer.json").read_text())
    assert state["identity"]["rewards"] == ["enumerable:wanted_codes=2"]
    assert command.main(["--output_dir", "x", "--max_steps", "1"]) == 2
    assert "--prompt_file is missing" in capsys.readouterr().err


def test_rewards_of_the_working_folder_are_found(enumerable, tmp_path, monkeypatch):
    """An installed command has its own folder on the path, not the working folder."""
    (tmp_path / "reward_of_mine.py").write_text("from enumerable import wanted_codes as score\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    options = f"--prompt_file {enumerable}/prompts.txt --init_from {enumerable} --output_dir {tmp_path}/run --groups 1"
    options += " --group_size 2 --max_steps 1 --precision fp32 --device cpu --reward reward_of_mine:score"
    assert command.main(options.split()) == 0
