"""Curves on disk are cut where a checkpoint noted them, and copied nowhere but into the run's folder."""

from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from zo_lightning.curves import continue_curves, mark


def loggers(folder: Path) -> list[TensorBoardLogger | CSVLogger]:
    return [kind(folder, name="", version="") for kind in (TensorBoardLogger, CSVLogger)]


def log(writers: list[TensorBoardLogger | CSVLogger], *steps: int) -> None:
    for writer in writers:
        for step in steps:
            writer.log_metrics({"loss": 0.1, **({"late": 1.0} if step > 1 else {})}, step)
        writer.save()


def test_table_whose_header_grew_keeps_its_rows(tmp_path: Path) -> None:
    first = loggers(tmp_path)
    log(first, 0, 1)
    marks = mark(first)
    log(first, 2)
    second = loggers(tmp_path)
    continue_curves(second, marks)
    log(second, 2)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows == ["late,loss,step", ",0.1,0", ",0.1,1", "1.0,0.1,2"]


def test_names_in_a_checkpoint_lead_nowhere_else(tmp_path: Path) -> None:
    """A checkpoint may be anybody's."""
    received, here = tmp_path / "received", tmp_path / "here"
    (received / "deep").mkdir(parents=True)
    for name in ("config.yaml", "events.out.tfevents.1"):
        (received / name).write_text("theirs")
    names = ("../config.yaml", "config.yaml", "../events.out.tfevents.1", str(received / "events.out.tfevents.1"))
    sizes = dict.fromkeys(names, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    continue_curves(loggers(here)[:1], [{"kind": "events", "folder": str(received / "deep"), "sizes": sizes}])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
