"""verl's layout: rows with data_source, prompt, ability, reward_model and extra_info."""

from collections.abc import Mapping, Sequence
from typing import Any

from l2t_trl.data.registry import ACCEPTED, plain_gold


# The two instructions end alike; verl's reward reads what follows the mark.
HASH_INSTRUCTIONS = {
    "verl": 'Let\'s think step by step and output the final answer after "####".',
    "l2t": 'Please reason step by step, and output the final answer after "####".',
}
BOXED_INSTRUCTIONS = {
    "verl": "Let's think step by step and output the final answer within \\boxed{}.",
    "l2t": "Please reason step by step, and put your final answer within \\boxed{}.",
}
FORMS = tuple(HASH_INSTRUCTIONS)
# Columns of ours that extra_info keeps: difficulty, and the task of reasoning-gym whose verifier judges the answer.
KEPT = ("tier", "reasoning_task")
# The request of the authors' preprocessing (episodes inside <think>, one logical move each) in words of our own.
L2T_SYSTEM_PROMPT = """\
You are a helpful assistant. Think before you answer, and write your thoughts between <think> and </think>.
Divide them into numbered episodes:
<think>
<episode_1> ... </episode_1>
<episode_2> ... </episode_2>
...
</think>
An episode holds exactly one logical move: a definition, a formula, a transformation, or one case. After </think> give \
the answer."""


def to_verl(
    question: str,
    gold: str,
    raw_answer: str,
    data_source: str,
    split: str,
    index: int,
    form: str = "verl",
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """
    Return one row as verl's and the L2T authors' preprocessing write it.

    Args:
        question (`str`): question without instruction.
        gold (`str`): gold answer.
        raw_answer (`str`): the answer as the data set has it, such as GSM8K's whole solution.
        data_source (`str`): Hub id, by which verl chooses its reward.
        split (`str`): name of the split.
        index (`int`): number of the row in its split.
        form (`str`, *optional*, defaults to `"verl"`): `"verl"` for the question alone, `"l2t"` for a system prompt
            that asks for episodes in front of it.
        system_prompt (`str`, *optional*): that of the form `"l2t"`, by default `L2T_SYSTEM_PROMPT`.

    Returns:
        `dict[str, Any]`
    """
    # verl's reward for GSM8K reads "####", its others a box.
    instruction = (HASH_INSTRUCTIONS if data_source == "openai/gsm8k" else BOXED_INSTRUCTIONS)[form]
    system = [{"role": "system", "content": system_prompt or L2T_SYSTEM_PROMPT}] if form == "l2t" else []
    return {
        "data_source": data_source,
        "prompt": [*system, {"role": "user", "content": f"{question} {instruction}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": split, "index": index, "answer": raw_answer, "question": question},
    }


def is_verl(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are in verl's layout: each with a `prompt`, and a `reward_model` that holds a `ground_truth`."""
    return all(
        "prompt" in row and isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]
        for row in rows
    )


def from_verl(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a row of verl's layout with `prompt`, `answer` and, where there are several golds, `accepted_answers`.

    The prompt stays as it is, instruction and system prompt included; `data_source` and `ability` stay, too, and what
    was kept in `extra_info` (`KEPT`) is a column again.
    """
    truth, extra = row["reward_model"]["ground_truth"], row.get("extra_info") or {}
    rest = {key: value for key, value in row.items() if key not in ("reward_model", "extra_info")}
    rest |= {name: extra[name] for name in KEPT if extra.get(name) is not None}
    # Several golds are ours to keep in extra_info; others make ground_truth a list.
    several = truth if isinstance(truth, list) else extra.get(ACCEPTED)
    golds = [plain_gold(gold) for gold in several] if isinstance(several, list) else None
    answer = plain_gold(truth) if not isinstance(truth, list) else next(iter(golds), None)
    return rest | {"answer": answer} | ({ACCEPTED: golds} if golds else {})
