"""Where TensorBoard is written to, and what is left out without a word."""

import sys

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_step.figures import Curve, VarianceLog
from lightning_step.monitoring.board import Board, boards_of

NONE = Curve((), ())


def test_a_board_is_found_by_its_writer(tmp_path):
    class Mine(SummaryWriter):
        pass

    class Own:
        experiment = Mine(str(tmp_path / "own"))

    class Nothing:
        pass

    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv"), Own(), Nothing()]
    assert len(boards_of(loggers)) == 2
    Own.experiment.close()


def test_a_run_without_samples_has_nothing_to_draw_or_mark(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        board, log = Board(writer), VarianceLog(NONE, NONE, NONE, Curve((1, 2), (1.0, 2.0)))
        board.variance("sparsity/variance", log, {2: "masks on"}, 2)
        board.mark("sparsity", log, 2)
        board.logarithms("sparsity", {"phase": 2.0, "variance_change": 0.0, "window_mean": float("nan")}, 2)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert (tags["scalars"], tags["images"]) == ([], [])


def test_without_matplotlib_there_are_no_pictures_and_all_the_rest(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it could not be imported
    log = VarianceLog(*[Curve((1, 2), (1.0, 2.0))] * 4)
    with SummaryWriter(str(tmp_path)) as writer:
        Board(writer).variance("sparsity/variance", log, {2: "masks on"}, 2)
        Board(writer).mark("sparsity", log, 2)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert (tags["images"], tags["scalars"]) == ([], ["sparsity/log10/switch"])
