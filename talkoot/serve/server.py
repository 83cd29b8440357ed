"""`talkoot serve`: opens a trained model, and answers requests until a signal arrives."""

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from prometheus_client import Gauge, ProcessCollector

from peer.errors import SettingsError
from peer.metrics import new_registry
from peer.platform.loop import new_event_loop
from talkoot.serve.access import read_keys
from talkoot.serve.app import make_app
from talkoot.serve.engine import Answering, Engine, Work, Writing
from talkoot.serve.model import ServedModel, model_of_folder, model_of_swarm
from talkoot.serve.settings import ServeSettings
from talkoot.signals import Stopped, StopSignals, run_until_stopped
from talkoot.terminal import Terminal
from talkoot.web import address_of, listen, serving
from trainer_client.decoding import make_decoder
from trainer_client.settings import TrainerSettings

logger: logging.Logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
"""How often it looks whether the swarm still admits it."""


def run_serve(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    folder: Path | None,
    trainer: TrainerSettings,
    settings: ServeSettings,
) -> None:
    """Serves until a signal arrives, which is not an error. Raises UserError if it can't start, and InviteError once
    the swarm no longer admits it.

    `folder`: a model folder; None: the model of a run, with the experts of the swarm that `join` names.
    """
    if (join is None) == (folder is None):
        raise SettingsError(
            "pass --join INVITE to use a swarm's experts, or --model DIR with a folder of `talkoot export`"
        )
    read_keys(settings.api_key_file)  # before anything that takes time
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    listener = listen(settings.host, settings.port)
    try:
        if folder is not None:
            with terminal.stages(f"reading {folder}"):
                served = model_of_folder(folder)
            _serve_until_stopped(terminal, served, settings, listener)
        else:
            with model_of_swarm(terminal, signals, join, trainer) as served:
                _serve_until_stopped(terminal, served, settings, listener)
    finally:
        listener.close()


def _serve_until_stopped(
    terminal: Terminal, served: ServedModel, settings: ServeSettings, listener: socket.socket
) -> None:
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run_until_stopped(_serve(terminal, served, settings, listener)))
    except Stopped:
        logger.info("stopped")


async def _serve(
    terminal: Terminal, served: ServedModel, settings: ServeSettings, listener: socket.socket
) -> None:
    async with server(served, settings, listener) as running:
        address = address_of(listener)
        if terminal.json:
            terminal.event("serve", {"url": address, "model": served.name})
        else:
            terminal.line(f"model {served.name}: {address}")
            terminal.line(f"for OpenAI's clients: base URL {address}v1")
        while not running.done():
            await asyncio.wait((running,), timeout=_LOOK_EVERY_S)
            await asyncio.to_thread(served.require_admitted)
        await running


@contextlib.asynccontextmanager
async def server(
    served: ServedModel, settings: ServeSettings, listener: socket.socket
) -> AsyncIterator["asyncio.Task[None]"]:
    """A server that runs until the block ends. Yields its task, which should not end. Raises DataError."""
    metrics = new_registry()
    ProcessCollector(registry=metrics)
    Gauge(
        "talkoot_serve_experts", "Experts of the model that can be used now.", registry=metrics
    ).set_function(served.live_experts)
    if settings.model_name is not None:
        served = dataclasses.replace(served, name=settings.model_name)
    keys = read_keys(settings.api_key_file)
    work: Work
    places = settings.max_streams
    if served.questions is None:
        work = Writing(make_decoder(served.model, served.is_usable, served.find))
    else:
        work, places = Answering(served.questions, served.tokenizer), min(places, Answering.AT_ONCE)
    engine = Engine(
        work,
        served.token_bytes,
        places,
        asyncio.get_running_loop(),
        served.nodes,
        metrics,
    )
    try:
        app = make_app(served, engine, keys, settings, metrics)
        async with serving(app, listener) as running:
            yield running
    finally:
        await asyncio.to_thread(engine.close)
