"""One readable line per logged step, in place of the whole log."""

from transformers import ProgressCallback


# Key in the trainer's log, name in the line, format.
COLUMNS = (
    ("reward", "reward", ".3f"),
    ("completions/mean_length", "tokens", ".1f"),
    ("completions/clipped_ratio", "cut off", ".2f"),
    ("l2t/episodes/mean", "episodes", ".1f"),
    ("l2t/fitting_gain/mean", "gain", "+.3f"),
    ("l2t/compression_penalty/mean", "penalty", ".3f"),
    ("eval_reward", "eval reward", ".3f"),
    ("kl", "KL", ".4f"),
    ("step_time", "seconds", ".1f"),
)


class StepLine(ProgressCallback):
    """The progress bar of transformers with a short line above it; everything logged is in `metrics.json`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            line = step_line(state.global_step, state.max_steps, logs or {})
            if line:
                self.training_bar.write(line)


def step_line(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """Return the line for one entry of the log, empty if nothing in it is told."""
    cells = [f"{name} {format(float(logs[key]), spec)}" for key, name, spec in COLUMNS if key in logs]
    return f"step {step:>{len(str(max_steps))}}/{max_steps}  {'  '.join(cells)}" if cells else ""
