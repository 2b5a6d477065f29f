"""Checks of a data set's rows, made before training starts."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal


logger = logging.getLogger(__name__)

BATCH_SIZE = 1000
ROWS_LISTED = 10
# Below this many rows the check is over before a progress bar says anything.
PROGRESS_FROM = 5000


def check_rows(
    dataset,
    tokenizer,
    answer_column: str | None = "answer",
    max_prompt_length: int | None = None,
    on_bad_row: Literal["stop", "drop"] = "stop",
):
    """
    Find rows that cannot be trained on: no prompt, no answer, an answer without tokens, a prompt that is too long.

    Args:
        dataset (`datasets.Dataset`):
            Data set with the column `prompt` (text or chat messages) and `answer_column` (text). A streamed data set,
            which has no length, is returned as it is.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer of the model, with a chat template if the prompts are chats.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the gold answer; `None` if none is needed.
        max_prompt_length (`int`, *optional*):
            Most tokens of a prompt, chat template included; by default there is no limit.
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            `"stop"` raises an error that names the rows, `"drop"` leaves them out with a warning that does.

    Returns:
        `datasets.Dataset`: the usable rows.

    Raises:
        ValueError: if a column is missing, if a row is bad and `on_bad_row` is `"stop"`, or if no row is left.
    """
    from datasets import IterableDataset
    from tqdm.auto import tqdm

    if isinstance(dataset, IterableDataset):
        return dataset
    names = ["prompt"] if answer_column is None else ["prompt", answer_column]
    for column in names:
        if column not in dataset.column_names:
            raise ValueError(
                f"The data set has no column {column!r}; its columns are {', '.join(dataset.column_names)}."
            )
    if len(dataset) == 0:
        raise ValueError("The data set has no rows.")

    bad_rows = defaultdict(list)
    columns = dataset.select_columns(names)
    for start in tqdm(
        range(0, len(dataset), BATCH_SIZE), desc="Checking rows", disable=len(dataset) < PROGRESS_FROM, leave=False
    ):
        batch = columns[start : start + BATCH_SIZE]
        answers = None if answer_column is None else batch[answer_column]
        reasons = _find_reasons(batch["prompt"], answers, tokenizer, answer_column, max_prompt_length)
        for offset, reason in enumerate(reasons):
            if reason is not None:
                bad_rows[reason].append(start + offset)
    if not bad_rows:
        return dataset

    num_bad = sum(len(rows) for rows in bad_rows.values())
    summary = "; ".join(f"{reason}: {list_rows(rows)}" for reason, rows in bad_rows.items())
    if on_bad_row == "stop":
        raise ValueError(
            f"{num_bad} of {len(dataset)} rows cannot be used (counted from 0). {summary}. "
            "Mend them, or set on_bad_row='drop' to leave them out."
        )
    if num_bad == len(dataset):
        raise ValueError(f"All {len(dataset)} rows were dropped, none is left. {summary}.")
    logger.warning("Dropped %d of %d rows (counted from 0). %s.", num_bad, len(dataset), summary)
    dropped = {row for rows in bad_rows.values() for row in rows}
    return dataset.select([row for row in range(len(dataset)) if row not in dropped])


def _find_reasons(
    prompts: Sequence[Any],
    answers: Sequence[Any] | None,
    tokenizer,
    answer_column: str | None,
    max_prompt_length: int | None,
) -> list[str | None]:
    """Return for each row why it cannot be used, or `None`."""
    reasons = [_prompt_reason(prompt) for prompt in prompts]
    if answers is not None:
        pairs = zip(reasons, answers, strict=True)
        reasons = [reason or _answer_reason(answer, answer_column) for reason, answer in pairs]
    usable = [row for row, reason in enumerate(reasons) if reason is None]
    if not usable:
        return reasons

    if answers is not None:
        answer_ids = tokenizer([answers[row] for row in usable], add_special_tokens=False)["input_ids"]
        for row, ids in zip(usable, answer_ids, strict=True):
            if len(ids) == 0:
                reasons[row] = f"{answer_column} has no token"

    if max_prompt_length is not None:
        texts = {row: _prompt_text(prompts[row], tokenizer) for row in usable}
        # A token stands for at least one byte, so only texts with more bytes than that need to be tokenised.
        long = [row for row, text in texts.items() if len(text.encode()) > max_prompt_length]
        prompt_ids = tokenizer([texts[row] for row in long], add_special_tokens=False)["input_ids"] if long else []
        for row, ids in zip(long, prompt_ids, strict=True):
            if len(ids) > max_prompt_length:
                reasons[row] = f"prompt longer than max_prompt_length={max_prompt_length} tokens"
    return reasons


def _prompt_reason(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        # The question is the last message; a system message alone asks nothing.
        texts = [_message_text(message) for message in prompt if message.get("role") != "system"]
    else:
        return "prompt is neither text nor a list of chat messages"
    if not texts or not texts[-1].strip():
        return "empty prompt"
    return None


def _answer_reason(answer: Any, answer_column: str) -> str | None:
    if answer is None:
        return f"{answer_column} is null"
    if not isinstance(answer, str):
        return f"{answer_column} is not text but {type(answer).__name__}"
    if not answer.strip():
        return f"{answer_column} is empty"
    return None


def _message_text(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _prompt_text(prompt: str | list[dict], tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def list_rows(rows: list[int]) -> str:
    """Return how many rows there are, and the numbers of the first."""
    listed = ", ".join(map(str, rows[:ROWS_LISTED]))
    more = f" and {len(rows) - ROWS_LISTED} more" if len(rows) > ROWS_LISTED else ""
    return f"{len(rows)} (row{'s' if len(rows) > 1 else ''} {listed}{more})"
