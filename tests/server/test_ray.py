"""Two replicas of the Ray Serve deployment, on a Ray of their own."""

import base64
import io
import json
import subprocess
import sys
import textwrap

import pytest
from commands import PATIENCE, ROOT, environment
from openai import OpenAI
from PIL import Image

from lumina_mgpt import Pipeline

PROMPT = "a cat on a white background"
# In another process, because Ray changes signals and threads of the one that starts it. It prints the port, and
# when the standard input has ended, the states of the replicas; Ray prints lines of its own.
SCRIPT = """
    import json, socket, sys
    import ray
    from ray import serve
    from lumina_mgpt.server.ray_app import Options, build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Options(model_path=sys.argv[1], device="cpu", min_replicas=2, max_replicas=2)))
    print(port, flush=True)
    sys.stdin.read()
    (application,) = serve.status().applications.values()
    print(json.dumps(application.deployments["Replica"].replica_states))
    serve.shutdown()
    ray.shutdown()
"""


@pytest.mark.slow
def test_two_replicas_answer_as_one_server(tiny_checkpoint):
    line = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tiny_checkpoint)]
    variables = environment(RAY_USAGE_STATS_ENABLED="0")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, env=variables, text=True, **pipes) as process:
        try:
            port = process.stdout.readline().strip()
            assert port, process.stderr.read()
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
            answers = [
                client.images.generate(prompt=PROMPT, size="32x32", extra_body={"seed": seed}).data[0].b64_json
                for seed in range(4)
            ]
            stream = client.images.generate(
                prompt=PROMPT, size="32x32", stream=True, partial_images=2, extra_body={"seed": 0}
            )
            events = [event.type.rpartition(".")[2] for event in stream]
        finally:
            output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    (states,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert states == {"RUNNING": 2}
    assert events == ["partial_image"] * 2 + ["completed"]
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu")
    for seed, answer in enumerate(answers):
        with Image.open(io.BytesIO(base64.b64decode(answer))) as picture:
            (result,) = pipeline.generate(PROMPT, 32, 32, seed=seed)
            assert picture.tobytes() == result.image.tobytes()
