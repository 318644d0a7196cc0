import csv

from acetate.callbacks.metrics_file import MetricsFile


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


def log(folder, *metrics, start=0):
    logger = MetricsFile(str(folder))
    for step, values in enumerate(metrics, start):
        logger.log_metrics(values, step=step)
    return logger


def test_a_second_process_goes_on_in_the_file(tmp_path):
    assert log(tmp_path, {"a": 1}, {"a": 2}).rows() == 2
    assert log(tmp_path, {"a": 3}, start=2).rows() == 3
    assert rows(tmp_path) == [{"a": 1, "step": 0}, {"a": 2, "step": 1}, {"a": 3, "step": 2}]


def test_rows_after_a_checkpoint_are_written_again(tmp_path):
    killed = log(tmp_path, {"a": 1}, {"a": 2})
    noted = killed.rows()
    killed.log_metrics({"a": 3}, step=2)
    killed.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,")  # half a row
    resumed = MetricsFile(str(tmp_path))
    resumed.keep(noted)
    resumed.log_metrics({"a": 5}, step=2)
    assert resumed.rows() == 3
    assert [row["a"] for row in rows(tmp_path)] == [1, 2, 5]


def test_a_new_file_has_none_of_the_rows_that_a_checkpoint_counts(tmp_path):
    logger = MetricsFile(str(tmp_path))
    logger.keep(5)
    assert logger.rows() == 0
    logger.log_metrics({"a": 1}, step=5)
    assert logger.rows() == 1
    logger.keep(1)
    assert rows(tmp_path) == [{"a": 1, "step": 5}]


def test_new_names_get_columns(tmp_path):
    assert log(tmp_path, {"b": 1}).rows() == 1
    assert log(tmp_path, {"a": 2}, {"b": 3}, start=1).rows() == 3
    assert rows(tmp_path) == [{"b": 1, "step": 0}, {"a": 2, "step": 1}, {"b": 3, "step": 2}]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"}
