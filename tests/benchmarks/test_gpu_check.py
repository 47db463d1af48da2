"""The check of a GPU: its self-test, its verdicts on faults that are made on purpose, its time and its options."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import PATIENCE, ROOT, environment
from gpu_check import command, kernels, parity, speed
from gpu_check.check import Check, Stage, run_stages
from gpu_check.setup import BF16, INT4, Setup, graph_options

from lumina_mgpt import Pipeline, cli, resources
from lumina_mgpt.model.quantization import Int4Linear

NAMES = [stage.name for stage in command.STAGES]
CPU = torch.device("cpu")


def printed(capsys) -> dict:
    """The JSON line, which is the last one."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def stage(name, work, share=10.0, least=0.0) -> Stage:
    return Stage(name, f"what {name} does", work, share, least)


def good(check: Check) -> None:
    check.record("answer", "the answer", 42, "42", "42")


def bad(check: Check) -> None:
    check.record("answer", "the answer", 41, "41", "42", good=False)


def broken(check: Check) -> None:
    raise RuntimeError("an illegal memory access was encountered\nin a kernel")


@pytest.mark.slow
def test_the_self_test_of_all_stages(tmp_path):
    files = tmp_path / "gpu.json", tmp_path / "gpu.md"
    line = ["bash", "scripts/gpu_check.sh", "--device", "cpu", "--json", files[0], "--table", files[1]]
    variables = environment(PYTHON=sys.executable, PYTHONPATH="")
    run = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "self-test on a CPU" in run.stdout.splitlines()[0]
    last = run.stdout.splitlines()[-1]
    assert last + "\n" == files[0].read_text() and files[1].read_text() in run.stdout
    found = json.loads(last)
    assert found["check"] == "gpu" and found["self_test"] is True and found["failed"] == []
    assert found["versions"]["torch"] == torch.__version__ and found["device"].startswith("CPU")
    stages = found["stages"]
    assert list(stages) == NAMES
    assert {name for name in NAMES if stages[name]["verdict"] == "skipped"} == {"flash"}  # it needs a GPU
    assert 0 < stages["parity"]["figures"]["demo_fp32_error"] < 1e-5
    assert 0 < stages["bandwidth"]["figures"]["int4_int8_window_64_bandwidth"] < 1.5
    for name in ("bf16", "int4", "int4_int8"):
        figures = stages["memory"]["figures"]
        assert 0 < figures[f"{name}_loaded_gb"] <= figures[f"{name}_peak_gb"]
    times = stages["batches"]["figures"]["bf16_batch_2_ms"]
    images = 60_000 * 2 / (256 * (times[0] + 2 * times[1] + times[2]) / 4)  # 256 codes in an image of 128 x 128
    assert stages["batches"]["figures"]["bf16_batch_2_images_a_minute"] == pytest.approx(images, rel=1e-3)
    assert stages["training"]["figures"]["all_weights_loss"] < 0 < stages["training"]["figures"]["adapters_s"]
    for name in NAMES:
        assert f"\n{name}: {stages[name]['verdict']}" in run.stdout and f"\n| {name} | verdict | **" in run.stdout


def test_a_failed_stage_ends_neither_the_run_nor_its_report(monkeypatch, capsys):
    stages = (stage("first", broken), stage("second", bad), stage("third", good))
    monkeypatch.setattr(command, "STAGES", stages)
    assert command.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["failed"] == ["first", "second"]
    first, second, third = (found["stages"][one.name] for one in stages)
    assert first["reason"] == "first: RuntimeError: an illegal memory access was encountered in a kernel"
    assert "raise RuntimeError" in first["trace"]
    assert second["reason"] == "the answer: 41, expected: 42" and second["figures"] == {"answer": 41}
    assert third == {"verdict": "ok", "reason": "", "seconds": third["seconds"], "figures": {"answer": 42}}
    assert re.search(r"\n\| third \| verdict \| \*\*ok\*\* \(\d s\) \|  \|\n\|  \| the answer \| 42 \| 42 \|\n", out)


def test_without_time_nothing_runs(capsys):
    assert command.main(["--device", "cpu", "--minutes", "0"]) == 0
    found = printed(capsys)
    assert {(one["verdict"], one["reason"]) for one in found["stages"].values()} == {
        ("skipped", "not run, out of time")
    }
    assert list(found["stages"]) == NAMES


def test_late_stages_get_what_is_left():
    """On a clock that only the stages move: 60 seconds for shares of 10, 40 and 10."""
    now, seen = [100.0], []

    def taking(seconds):
        def work(check: Check) -> None:
            seen.append(check.deadline - now[0])
            now[0] += seconds
            good(check)

        return work

    stages = [stage("quick", taking(2)), stage("slow", taking(55), 40), stage("late", taking(1), 10, least=400)]
    outcomes = run_stages(stages, Setup(CPU, True), 1.0, 100.0, clock=lambda: now[0])
    assert seen == [pytest.approx(10), pytest.approx(48)]  # what the first leaves goes to the second
    assert [one.verdict for one in outcomes] == ["ok", "ok", "skipped"]
    assert outcomes[2].reason == "not run, out of time" and outcomes[1].seconds == 55


def test_a_stage_that_does_not_end_is_stopped():
    def endless(check: Check) -> None:
        good(check)
        while True:
            try:
                time.sleep(60)
            except Exception:  # as a library may do
                continue

    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    (outcome,) = run_stages([stage("endless", endless)], Setup(CPU, True), 0.01, began)
    assert time.monotonic() - began < 10
    assert (outcome.verdict, outcome.reason) == ("ok", "the rest: out of time") and outcome.figures[0].value == 42
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_part_that_does_not_fit_is_left_out(monkeypatch):
    check = Check(Setup(CPU, True))
    monkeypatch.setattr(Setup, "free_bytes", lambda self: 10**6)
    speed.memory(check)
    assert not check.figures and not check.problems
    assert len(check.left_out) == 3 and "bf16: needs" in check.left_out[0] and "0.0 GB are free" in check.left_out[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "parity,flesh"], "--stages must be names of environment,"),
        (["--minutes", "-1"], "--minutes must be in 0 ... 1440, got -1"),
        (["--minutes", "nan"], "--minutes must be in 0 ... 1440, got nan"),
        (["--minutes", "soon"], "--minutes must be a number, got 'soon'"),
        (["--device", "cuda:99"], "--device cuda:99 needs a CUDA GPU"),
        (["--device", "tpu"], "--device must be"),
        (["--json", "nowhere/gpu.json"], "--json must be a file in a folder that exists"),
        (["--table", "."], "--table must be a file"),
        (["--table", "/proc/gpu.md"], "--table /proc/gpu.md cannot be written"),
        (["--first_generation", "nowhere"], "--first_generation must be the folder of a checkpoint"),
        (["--stage", "int4"], "--stage"),
    ],
)
def test_invalid_options_are_refused(capsys, options, message):
    assert command.main(options) == cli.REFUSED
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_a_stopped_run_says_what_remains(monkeypatch, capsys, tmp_path):
    def stop(check: Check) -> None:
        good(check)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "STAGES", (stage("first", stop),))
    assert command.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")]) == 128 + signal.SIGINT
    printed = capsys.readouterr()
    assert "the answer: 42" in printed.out and not list(tmp_path.iterdir())
    assert printed.err == "stopped by Ctrl-C; figures so far are above, and no file is written\n"


def test_an_int4_kernel_that_is_slightly_wrong_fails(monkeypatch, capsys):
    forward = Int4Linear.forward
    monkeypatch.setattr(Int4Linear, "forward", lambda self, x: 1.02 * forward(self, x))
    assert command.main(["--device", "cpu", "--stages", "int4"]) == 1
    assert "largest error for 1, 2, 16, 17, 64, 65, 128 rows: 0.02" in printed(capsys)["stages"]["int4"]["reason"]


@pytest.fixture(scope="module")
def reference() -> parity.Reference:
    return parity.Reference.of(resources.demo_checkpoint(), 32)


def test_an_image_that_differs_without_a_tie_fails(reference):
    check = Check(Setup(CPU, True))
    for way in ("greedy image", "sampled image"):
        theirs = reference.images[way]
        parity.compare_images(check, "same", reference, way, theirs.clone(), theirs)
        assert not check.problems
        other = theirs.clone()
        other[1, 2] = (other[1, 2] + 1) % 2048
        parity.compare_images(check, "other", reference, way, other, theirs)
        assert check.problems.pop() == "other: differ from code 6 on, not a near tie, expected: equal, or a near tie"


def test_weights_that_deviate_are_seen_in_the_logits(reference):
    pipeline = Pipeline.from_pretrained(resources.demo_checkpoint(), CPU, "fp32")
    assert parity.error_of(reference.logits_of(pipeline), reference.logits) < 1e-5
    with torch.no_grad():
        pipeline.model.layers[3].mlp.down_proj.weight.mul_(1.001)
    assert parity.error_of(reference.logits_of(pipeline), reference.logits) > parity.FP32_ERROR
    one, other = torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    one[0, :, 3], other[0, :3, 3], other[0, 3, 5] = 9, 9, 9
    assert parity.share_of(one, other) == 0.75


def test_logits_of_an_image_are_those_of_one_forward(reference):
    """In float64, without steps or cache."""
    exact = reference.exact
    (start,) = exact.checkpoint.prompt_ids([reference.prompt], reference.layout)
    image = [reference.layout.ids.tolist()[i] for i in range(reference.layout.prefix_length)]
    for row in (reference.codes + exact.checkpoint.vocabulary.code_slice.start).tolist():
        image += [*row, reference.layout.ids.tolist()[reference.layout.prefix_length + len(row)]]
    known = image[:-2]  # the last code and the end of its row are not fed
    with torch.no_grad():
        hidden = exact.model(torch.tensor([[*start, *known]]))
        logits = exact.model.project(hidden, exact.checkpoint.vocabulary.code_slice)
    expected = logits[0, len(start) + reference.layout.prefix_length - 1 :]
    torch.testing.assert_close(reference.logits[0], expected, rtol=1e-9, atol=1e-9)


def test_weight_bytes_are_those_of_the_random_models():
    setup = Setup(CPU, True)
    for form in (BF16, INT4):
        model = setup.random_pipeline(form).model
        stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert speed.weight_bytes(setup.sizes.config, form, CPU) == pytest.approx(stored, rel=0.01)


def test_memory_of_the_7b_is_as_documented():
    """14.5 GB of bf16 weights, 5.0 GB in int4, 9.9 GB of cache: docs/installation.md and docs/quantization.md."""
    setup = Setup(torch.device("cuda"), False)
    config = setup.sizes.config
    assert speed.weight_bytes(config, BF16, setup.device) / 1e9 == pytest.approx(14.5, abs=0.1)
    assert speed.weight_bytes(config, INT4, setup.device) / 1e9 == pytest.approx(5.0, abs=0.1)
    cache = speed.room(setup, BF16) - speed.weight_bytes(config, BF16, setup.device)
    assert cache / 1e9 == pytest.approx(9.9, abs=0.1)


def test_captured_steps_are_compared_where_the_version_has_them(monkeypatch):
    """The option is absent, or a pipeline accepts it."""
    assert graph_options(True) in ({}, {"cuda_graphs": True})
    Pipeline.from_pretrained(resources.demo_checkpoint(), CPU, "fp32", **graph_options(False))
    check = Check(Setup(CPU, True))
    monkeypatch.setattr(kernels, "has_compiler", lambda device: False)
    kernels.steps(check)
    assert not check.figures and check.left_out == ["compiled: torch finds no compiler for this device"]


@pytest.mark.parametrize("names", ["int4", pytest.param("environment,parity,flash,int4", marks=pytest.mark.slow)])
def test_stages_on_a_pretended_gpu(names, capsys):
    pretend_gpu = pytest.importorskip("pretend_gpu")
    with pretend_gpu.pretend("lumina_mgpt/", "a100"):
        assert command.main(["--device", "cuda", "--self_test", "--stages", names]) == 0
    found = printed(capsys)
    assert {one["verdict"] for one in found["stages"].values()} == {"ok"} and "a100" in found["device"]
    assert found["stages"]["int4"]["figures"]["256x384_kernel"] == "cuda"
