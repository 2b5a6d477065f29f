"""
The verdicts of lighteval's and verl's own scorers, in an environment of their own: see benchmarks/scorers.py.

    python benchmarks/peers/judge.py CASES.jsonl VERDICTS.jsonl

A case has `benchmark` (gsm8k or math500), `question`, `solution` (the data set's, whole), `answer` (the gold answer
alone) and `text` (the completion). A line of verdicts has one per scorer.
"""

import json
import sys
from importlib.metadata import version


def lighteval_scorer(task, columns):
    """Return lighteval's metric of a task, given the names that its prompt function has for question and solution."""
    from lighteval.models.model_output import ModelResponse

    (metric,) = task.metrics

    def score(case):
        # The prompt function also makes the gold answer: from the whole solution, for both benchmarks.
        document = task.prompt_function(
            dict(zip(columns, (case["question"], case["solution"]), strict=True)), task.name
        )
        response = ModelResponse(text=[case["text"]])
        return metric.compute_sample(doc=document, model_response=response)[metric.metric_name]

    return score


def scorers():
    """Return by benchmark and name what judges a case."""
    from lighteval.tasks.tasks.gsm8k import gsm8k as gsm8k_task
    from lighteval.tasks.tasks.math_500 import math_500 as math_500_task
    from verl.utils.reward_score import default_compute_score, gsm8k, math_dapo

    return {
        "gsm8k": {
            "lighteval gsm8k": lighteval_scorer(gsm8k_task, ("question", "answer")),
            "verl gsm8k": lambda case: default_compute_score("openai/gsm8k", case["text"], case["answer"]),
            "verl gsm8k, flexible": lambda case: gsm8k.compute_score(case["text"], case["answer"], "flexible"),
        },
        "math500": {
            "lighteval math_500": lighteval_scorer(math_500_task, ("problem", "solution")),
            "verl math_reward": lambda case: default_compute_score(
                "HuggingFaceH4/MATH-500", case["text"], case["answer"]
            ),
            "verl math_dapo": lambda case: math_dapo.compute_score(case["text"], case["answer"])["acc"],
        },
    }


def main():
    from tqdm import tqdm

    by_benchmark = scorers()
    with open(sys.argv[1], encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        names = ("lighteval", "verl", "latex2sympy2_extended")
        print(json.dumps({name: version(name) for name in names}), file=file)
        for case in tqdm(cases, desc="lighteval and verl", unit="completion"):
            verdicts = {name: bool(score(case)) for name, score in by_benchmark[case["benchmark"]].items()}
            print(json.dumps(verdicts), file=file)


if __name__ == "__main__":
    main()
