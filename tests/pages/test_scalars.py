import pytest

from volseg.pages.scalars import Scalars

pytest.importorskip("tensorboard", reason="TensorBoard is not installed")


def test_tensorboard_reads_the_added_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = Scalars(tmp_path)
    for step, loss in ((10, 1.5), (20, 0.75)):
        scalars.add("fold", step, {"loss": loss})
    scalars.close()
    events = EventAccumulator(str(tmp_path / "fold")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(10, 1.5), (20, 0.75)]


def test_a_run_without_values_writes_nothing(tmp_path):
    Scalars(tmp_path / "none").close()
    assert not (tmp_path / "none").exists()
