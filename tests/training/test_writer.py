"""The console and the logs of a run."""

from kontext_jax.training.writer import Writer
from tests.logs import read_log


def test_console_has_short_names_and_percentages(tmp_path, capsys):
    writer = Writer(tmp_path, num_steps=9)
    rates = {"examples_per_second_per_chip": 2.25, "model_tflop_per_second_per_chip": 502.1}
    shares = {"data_wait": 0.0123, "mfu": 0.5077}
    writer.metrics(2, rates | shares | {"model/loss": 0.5})
    writer.close()
    expected = "step 2/9  loss 0.5  samples/s/chip 2.25  TFLOP/s/chip 502.1  data wait 1.2%  "
    expected += "MFU 50.8%  ETA"
    assert capsys.readouterr().out.startswith(expected)
    assert read_log(tmp_path) == [{"step": 2} | rates | shares | {"model/loss": 0.5}]


def test_only_training_lines_show_the_remaining_time(tmp_path, capsys):
    """Validation takes place between two steps, so it has no rate."""
    writer = Writer(tmp_path, num_steps=9)
    writer.metrics(2, {"loss": 0.5}, log="validation")
    writer.close()
    assert capsys.readouterr().out == "step 2/9  validation  loss 0.5\n"


def test_log_drops_steps_that_will_be_repeated(tmp_path):
    writer = Writer(tmp_path, num_steps=9)
    for step in (2, 4, 6):
        writer.metrics(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # truncated by a kill
    writer = Writer(tmp_path, num_steps=9, start_step=4)
    writer.metrics(6, {"loss": 7.0})
    writer.close()
    assert read_log(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "loss": 7.0},
    ]
