"""A run that was stopped continues exactly as if it had not been."""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from router_fakes import LearningSwarm
from run_samples import (
    MANIFEST,
    SWARM,
    TEXT,
    assert_same,
    make_settings,
    start,
    train_dense,
    train_on,
    write_text,
)
from torch import Tensor, nn

from peer.checkpoints import RotatingFiles
from peer.errors import CheckpointError, StartError, StateError, UserError
from peer.files import StateFolder
from peer.optimizer import Optimizer
from trainer_client.data.corpus import Dataset
from trainer_client.model import LanguageModel
from trainer_client.settings import RouterName
from trainer_client.training import checkpoints
from trainer_client.training.checkpoints import (
    CheckpointSaver,
    CheckpointWriter,
    checkpoint_folder,
    load_checkpoint,
)
from trainer_client.training.loop import Training


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= level)


# One of them draws noise and chance, one uses dropout, and one has biases.
@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        ("noisy-top-k", 2),
        pytest.param("switch", 1, marks=pytest.mark.slow),
        pytest.param("product-key", 2, marks=pytest.mark.slow),
    ],
)
def test_five_steps_and_five_resumed_are_ten_straight(
    tmp_path: Path, name: RouterName, accumulate: int
) -> None:
    """Losses, parameters and experts are equal bit by bit."""
    text = str(write_text(tmp_path))
    settings = make_settings(
        data=text,
        router=name,
        batch_size=2,
        accumulate=accumulate,
        validate_every=4,
        tokenizer="bpe",
        vocabulary=280,
    )
    straight, broken = LearningSwarm(MANIFEST), LearningSwarm(MANIFEST)
    whole = train_on(straight, name, start(tmp_path / "a", settings))
    first = train_on(broken, name, start(tmp_path / "b", settings), stop_after=5)
    assert first.summary.steps == 5
    second = train_on(broken, name, start(tmp_path / "b", make_settings(batch_size=2), resume=True))
    assert len(whole.losses) == 10
    assert first.losses + second.losses == whole.losses
    assert_same(second.parameters, whole.parameters)
    for uid, expert in straight.experts.items():
        assert_same(broken.experts[uid].export_state(), expert.export_state())
    for figure in ("steps", "loss_first", "loss_last", "validation_loss_first", "validation_loss_last"):
        assert getattr(second.summary, figure) == getattr(whole.summary, figure)
    assert second.summary.resumed_at == 5


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_resumed_run_takes_every_batch_once_and_first_those_that_were_in_flight(
    tmp_path: Path, in_flight: int
) -> None:
    text, may_end = str(write_text(tmp_path)), threading.Event()

    def train(resume: bool, stop_after: int = 10, **given: Any) -> tuple[list[int], list[int]]:
        """Returns the steps that were begun, and their batches, to which steps in flight may still add theirs."""
        begun, batches = list[int](), list[int]()

        class NotedSteps(Training):
            def _numbers(self) -> Iterator[int]:
                for number in super()._numbers():
                    begun.append(number)
                    yield number

        class NotedBatches(Dataset):
            def batch(self, step: int, batch_size: int) -> Tensor:
                batches.append(step)
                assert step != 3 or may_end.wait(60)
                return super().batch(step, batch_size)

        def make_model() -> LanguageModel:
            return LanguageModel(MANIFEST, lambda layer: nn.Identity())

        began, stop = start(tmp_path, make_settings(data=text, **given), resume), threading.Event()
        training = NotedSteps(make_model(), NotedBatches(began.corpus.tokens, 16), began.settings, make_model)
        began.restore(training)
        saver = CheckpointSaver(began, training, MANIFEST, 0)
        training.run(lambda progress: stop.set() if progress.step == stop_after else None, stop)
        saver.save()
        return begun, batches

    try:
        _, first = train(resume=False, stop_after=6, in_flight=3)
        folder = checkpoint_folder(None, tmp_path, SWARM, newest=True)
        unfinished = load_checkpoint(folder, SWARM).header.unfinished
        assert 3 in unfinished
    finally:
        may_end.set()
    shorter, second = train(resume=True, steps=7, in_flight=in_flight)
    assert shorter == [*unfinished[:1]], "it begins only steps that it takes"
    rest, third = train(resume=True, steps=10, in_flight=in_flight)
    assert rest == [*unfinished[1:], *range(6 + len(unfinished), 10)]
    assert sorted([step for step in first if step not in unfinished] + second + third) == list(range(10))


def test_a_resume_needs_nothing_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = train_dense(start(tmp_path / "state", make_settings(data="sauna.txt", seed=7, batch_size=3)), 4)
    monkeypatch.chdir("/")
    again = start(tmp_path / "state", make_settings(), resume=True)
    # make_settings sets figures of its own, which take precedence.
    assert (again.settings.seed, again.settings.batch_size) == (7, 4)
    assert again.settings.data == (str(tmp_path / "sauna.txt"),)
    assert again.writer.folder == first.folder


def test_a_checkpoint_with_a_setting_that_no_longer_exists_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_dense(start(tmp_path, make_settings(data=str(write_text(tmp_path)))), 4).folder
    checkpoint = load_checkpoint(folder, SWARM)
    older = checkpoint.header.settings | {"in_flight_limit": 7}
    header = checkpoint.header.model_copy(update={"settings": older})
    assert CheckpointWriter(folder, 3).save(header, checkpoint.tensors)
    assert train_dense(start(tmp_path, make_settings(), resume=True)).summary.steps == 10
    assert said(caplog) == ""


def test_a_run_of_no_steps_takes_settings_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_dense(start(tmp_path, make_settings(data=str(write_text(tmp_path)))), 4).folder
    checkpoint = load_checkpoint(folder, SWARM)
    header = checkpoint.header.model_copy(update={"step": 0})
    imported = CheckpointWriter(folder.with_name("imported"), 1)
    assert imported.save(header, checkpoint.tensors)
    resumed = start(
        tmp_path, make_settings(steps=20, checkpoint=str(folder.with_name("imported"))), resume=True
    )
    assert resumed.settings.steps == 20
    assert said(caplog) == ""


def test_what_is_changed_at_a_resume_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = write_text(tmp_path)
    train_dense(start(tmp_path / "state", make_settings(data=str(text))), 4)
    write_text(tmp_path, TEXT + "more")
    start(tmp_path / "state", make_settings(steps=20, clip_norm=0.5), resume=True)
    assert "resuming with other settings: clip_norm 0.5, not 1.0" in said(caplog)
    assert "the text differs from the text that the checkpoint was trained on" in said(caplog)
    caplog.clear()
    write_text(tmp_path)
    start(tmp_path / "state", make_settings(), resume=True)
    assert said(caplog) == ""


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tokenizer": "bpe"}, "tokenizer: the checkpoint's model has bytes, and can't change to bpe"),
        ({"steps": 4}, "has already taken all 4 steps: pass a larger number, such as --steps 8"),
        ({"data": "nowhere.txt"}, "no file or folder nowhere.txt"),
        ({"steps": 9, "memory": "docs"}, "the checkpoint's model reads no memory, and can't begin to"),
    ],
)
def test_what_can_not_be_changed_is_refused(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    train_dense(start(tmp_path, make_settings(data=str(write_text(tmp_path)))), 4)
    with pytest.raises(UserError, match=error):
        start(tmp_path, make_settings(**changes), resume=True)


def test_what_was_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / "text" / name).write_text("sauna " * 100)
    with caplog.at_level(logging.INFO):
        start(tmp_path / "state", make_settings(data=str(tmp_path / "text")))
    assert "the text has 1,201 tokens, from 2 files" in said(caplog, logging.INFO)


def test_a_text_that_has_moved_is_passed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = write_text(tmp_path)
    train_dense(start(tmp_path / "state", make_settings(data=str(text))), 4)
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match=r"no file or folder .*sauna\.txt: .* elsewhere now, pass --data"):
        start(tmp_path / "state", make_settings(), resume=True)
    start(tmp_path / "state", make_settings(data=str(moved)), resume=True)
    assert "the text differs" not in said(caplog)


def test_a_router_of_other_parameters_does_not_fit(tmp_path: Path) -> None:
    text = str(write_text(tmp_path))
    swarm = LearningSwarm(MANIFEST)
    train_on(swarm, "product-key", start(tmp_path, make_settings(data=text)), 2)
    again = start(tmp_path, make_settings(router="noisy-top-k"), resume=True)
    with pytest.raises(
        CheckpointError, match=r"step 2 does not fit: it and this model differ in 'mixtures\.0"
    ):
        train_on(swarm, "noisy-top-k", again)


def trained_one_step(tmp_path: Path) -> tuple[LanguageModel, Training, dict[str, torch.Tensor]]:
    """A model, its training, and the training's state."""
    settings = make_settings(data=str(write_text(tmp_path)), steps=1)
    dataset = Dataset(start(tmp_path, settings).corpus.tokens, 16)
    model = LanguageModel(MANIFEST, lambda layer: nn.Identity())
    training = Training(model, dataset, settings)
    training.run(lambda progress: None, threading.Event())
    state = training.export_state()
    assert state is not None
    return model, training, state


@pytest.mark.parametrize(
    ("moment", "odd", "said"),
    [
        ("step", torch.tensor(-1.0), "are negative"),
        ("step", torch.ones(1), r"step is \(1,\)"),
        ("exp_avg_sq", -torch.ones(()), "are negative"),
        ("exp_avg_sq", torch.ones((), dtype=torch.float64), "torch.float64"),
    ],
)
def test_moments_that_would_break_the_next_step_are_refused_and_change_nothing(
    tmp_path: Path, moment: str, odd: torch.Tensor, said: str
) -> None:
    model, training, state = trained_one_step(tmp_path)
    name = f"optimizer.head.weight.{moment}"
    state[name] = odd if odd.shape else odd.expand(state[name].shape).clone()
    state["model.head.weight"] += 1
    before = model.head.weight.clone()
    with pytest.raises(StateError, match=said):
        training.import_state(state, 1)
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("gone", [{"validated"}, {"validation_losses"}, {"validated", "validation_losses"}])
def test_a_run_that_lost_its_validations_is_refused(tmp_path: Path, gone: set[str]) -> None:
    _, training, state = trained_one_step(tmp_path)
    left = {name: tensor for name, tensor in state.items() if name.removeprefix("history.") not in gone}
    with pytest.raises(StateError, match="its history is incomplete"):
        training.import_state(left, 1)
    training.import_state(state, 1)


# Folders


def test_nothing_is_lost_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(write_text(tmp_path))
    times = iter(["20260101-120000", "20260101-120100"])
    monkeypatch.setattr("trainer_client.training.checkpoints.time.strftime", lambda form: next(times))
    first = train_dense(start(tmp_path, make_settings(data=text)), 2)
    second = train_dense(start(tmp_path, make_settings(data=text, seed=1)), 2)
    assert first.folder == tmp_path / "runs" / SWARM / "20260101-120000"
    assert os.listdir(first.folder) == os.listdir(second.folder) == ["2.safetensors"]
    assert checkpoint_folder(None, tmp_path, SWARM, newest=True) == second.folder
    os.utime(first.folder / "2.safetensors", (2**32, 2**32))
    assert checkpoint_folder(None, tmp_path, SWARM, newest=True) == first.folder


def test_a_new_run_leaves_the_checkpoints_of_another_alone(tmp_path: Path) -> None:
    settings = make_settings(data=str(write_text(tmp_path)), checkpoint=tmp_path / "mine")
    train_dense(start(tmp_path / "state", settings), 4)
    with pytest.raises(CheckpointError, match="mine has a checkpoint of step 4: pass --resume"):
        start(tmp_path / "state", settings)
    assert train_dense(start(tmp_path / "state", settings, resume=True)).summary.steps == 10


def test_a_folder_where_another_trainer_saves_is_refused(tmp_path: Path) -> None:
    """Each would remove the other's checkpoints."""
    settings = make_settings(data=str(write_text(tmp_path)), checkpoint=tmp_path / "mine")
    first = start(tmp_path / "one", settings)
    with (
        first.writer.locked(),
        pytest.raises(CheckpointError, match=r"another trainer saves its run in .*mine: stop it, or pass"),
    ):
        start(tmp_path / "two", settings)
    start(tmp_path / "two", settings)


def test_a_folder_on_a_disk_without_locks_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoints, "lock", no_locks)
    settings = make_settings(data=str(write_text(tmp_path)), checkpoint=tmp_path / "mine")
    assert train_dense(start(tmp_path / "state", settings), 4).summary.steps == 4


@pytest.mark.parametrize("checkpoint", [None, "absent"])
def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path, checkpoint: str | None) -> None:
    given = {} if checkpoint is None else {"checkpoint": tmp_path / checkpoint}
    with pytest.raises(CheckpointError, match="no checkpoint "):
        start(tmp_path, make_settings(**given), resume=True)


def test_a_folder_that_can_not_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        start(tmp_path, make_settings(checkpoint=tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"can't make the folder .*: Not a directory; pass another"):
        start(tmp_path, make_settings(checkpoint=tmp_path / "file" / "below"))
    holder = StateFolder(tmp_path)
    with pytest.raises(StartError, match="another process uses the state folder"):
        start(tmp_path, make_settings())
    holder.close()


# When to save


def test_checkpoints_come_every_so_many_steps_and_the_newest_stay(tmp_path: Path) -> None:
    settings = make_settings(data=str(write_text(tmp_path)), checkpoint_every=3, checkpoints_kept=2)
    ran = train_dense(start(tmp_path, settings))
    assert sorted(os.listdir(ran.folder)) == ["10.safetensors", "9.safetensors"]


def test_a_run_without_a_step_saves_nothing(tmp_path: Path) -> None:
    settings = make_settings(data=str(write_text(tmp_path)))
    began = start(tmp_path, settings)
    model = LanguageModel(MANIFEST, lambda layer: nn.Identity())
    stop = threading.Event()
    stop.set()
    Training(model, Dataset(began.corpus.tokens, 16), settings).run(lambda progress: None, stop)
    assert not began.writer.folder.exists()


def test_a_step_broken_off_before_its_end_leaves_the_one_before(tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    class Interrupted(LanguageModel):
        broken = False

        def loss(self, tokens_BT: torch.Tensor, neighbours_BUNL: torch.Tensor | None = None) -> torch.Tensor:
            if self.broken:
                raise Stopped
            return super().loss(tokens_BT)

    model = Interrupted(MANIFEST, lambda layer: nn.Identity())
    settings = make_settings(data=str(write_text(tmp_path)))
    training = Training(model, Dataset(start(tmp_path, settings).corpus.tokens, 16), settings)

    def observe(progress: Any) -> None:
        model.broken = progress.step == 3

    with pytest.raises(Stopped):
        training.run(observe, threading.Event())
    state = training.export_state()
    assert state is not None
    assert training.step == 3
    assert state["optimizer.head.weight.step"].item() == 3


def test_a_checkpoint_that_a_signal_interrupts_is_saved_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    write = RotatingFiles.write

    def interrupted(*_: object) -> None:
        monkeypatch.setattr(RotatingFiles, "write", write)
        raise Stopped

    settings = make_settings(data=str(write_text(tmp_path)), checkpoint_every=3)
    began = start(tmp_path, settings)
    training = Training(
        LanguageModel(MANIFEST, lambda layer: nn.Identity()), Dataset(began.corpus.tokens, 16), settings
    )
    saver = CheckpointSaver(began, training, MANIFEST, 0)
    monkeypatch.setattr(RotatingFiles, "write", interrupted)
    with pytest.raises(Stopped):
        training.run(lambda progress: saver.save_if_due(), threading.Event())
    saver.save()
    assert saver.saved_step == load_checkpoint(saver.folder, SWARM).header.step == 3


def test_a_step_broken_off_within_the_optimizer_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    settings = make_settings(data=str(write_text(tmp_path)))
    began = start(tmp_path, settings)
    training = Training(
        LanguageModel(MANIFEST, lambda layer: nn.Identity()), Dataset(began.corpus.tokens, 16), settings
    )

    def broken(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(Optimizer, "step", broken)
    with pytest.raises(Stopped):
        training.run(lambda progress: None, threading.Event())
    assert training.export_state() is None
