"""The server as a Ray Serve deployment: replicas on the GPUs of several machines, with autoscaling.

    serve run lumina_mgpt.server.ray_app:build model_path=Alpha-VLLM/Lumina-mGPT-2.0 gpus=1 max_replicas=8

It needs the extra `ray`. docs/server.md describes a cluster.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.resources import demo_checkpoint
from lumina_mgpt.server.app import create_app
from lumina_mgpt.server.engine import QUEUE_LIMIT, Engine

KEY_VARIABLE = "LUMINA_MGPT_API_KEY"  # on the machines of the replicas
_TARGET = 16  # requests of a replica, from which on another is started: one batch


class Options(BaseModel):
    """What a deployment serves, and on how many replicas.

    Attributes:
        model_path: checkpoint folder or hub id; every machine must be able to read it (default: the demo).
        quant: int4 group size, to quantize while loading.
        text: load what the model needs to write text (default: where its family is trained to).
        gpus, cpus: of each replica.
        min_replicas, max_replicas: limits of the autoscaling.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_path: str | None = None
    movqgan_path: str | None = None
    model_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quant: int | None = None
    text: bool | None = None
    batch_size: int | None = None
    max_queue: int = QUEUE_LIMIT
    gpus: float = Field(0, ge=0)
    cpus: float = Field(1, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)


@serve.deployment(max_ongoing_requests=2 * QUEUE_LIMIT)
@serve.ingress()
class Replica:
    """One process with a loaded checkpoint, its engine and the app of `create_app`."""

    def __init__(self, options: Options) -> None:
        path = options.model_path or demo_checkpoint()
        pipeline = Pipeline.from_pretrained(
            path,
            options.device,
            options.dtype,
            options.movqgan_path,
            quant=options.quant,
            text=options.text,
        )
        name = options.model_name or Path(path).name
        self.engine = Engine(pipeline, name, options.batch_size, options.max_queue)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.engine, api_key=os.environ.get(KEY_VARIABLE) or None)

    def check_health(self) -> None:
        """Raises an error if the engine has ended, so that Ray replaces the replica."""
        if not self.engine.alive:
            raise RuntimeError("the engine has ended")


def build(options: Options) -> Application:
    """Returns the application that `serve run` and a config file of Ray Serve start."""
    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": max(options.min_replicas, options.max_replicas),
        "target_ongoing_requests": _TARGET,
    }
    resources = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    deployment = Replica.options(autoscaling_config=scaling, ray_actor_options=resources)  # type: ignore[attr-defined]
    return deployment.bind(options)
