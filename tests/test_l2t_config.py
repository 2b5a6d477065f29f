import pytest

from l2t_trl import L2TConfig


def config(**settings):
    return L2TConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process_reward_coef": -0.1}, "process_reward_coef must be a finite number, 0 or larger, got -0.1"),
        ({"compression_coef": float("nan")}, "compression_coef must be a finite number"),
        ({"fisher_damping": float("inf")}, "fisher_damping must be a finite number"),
        ({"trim_fraction": 1.0}, "trim_fraction must be at least 0 and below 1, got 1.0"),
        ({"proxy_rank_ratio": 0.0}, "proxy_rank_ratio must be above 0 and at most 1, got 0.0"),
        ({"proxy_rank_ratio": 1.5}, "proxy_rank_ratio must be above 0 and at most 1, got 1.5"),
        ({"fisher_ema": 1.0}, "fisher_ema must be at least 0 and below 1"),
        ({"max_episodes": 0}, "max_episodes must be 1 or larger, got 0"),
        ({"proxy_refresh_steps": -1}, "proxy_refresh_steps must be"),
        ({"scoring_batch_size": 0}, "scoring_batch_size must be 1 or larger"),
        ({"max_prompt_length": 0}, "max_prompt_length must be 1 or larger"),
        ({"answer_probe": ""}, "answer_probe must be a text"),
        ({"proxy_modules": "("}, "proxy_modules must be a regular expression"),
        ({"advantage_form": "token"}, "advantage_form must be one of"),
        ({"episode_format": "xml"}, "episode_format must be one of"),
        ({"loss_type": "luspo"}, "Set loss_type to one of"),
        ({"loss_type": "vespo"}, "Set loss_type to one of"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"importance_sampling_level": "sequence"}, "Set importance_sampling_level='token'"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"num_continuations": 0}, "num_continuations must be 1 or larger, got 0"),
        ({"max_continuation_length": 0}, "max_continuation_length must be 1 or larger, got 0"),
        (
            {
                "correctness_estimator": "rollout",
                "use_vllm": True,
                "vllm_max_model_length": 100,
                "max_prompt_length": 50,
                "max_completion_length": 16,
                "max_continuation_length": 40,
                "answer_probe": "</think>",
            },
            "may take 50 + 16 + 8 + 40 = 114 tokens. Set it to that",
        ),
        ({"weight_sync_dir": "x"}, "Set use_vllm=True and vllm_mode='server'"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert message in str(error.value)


def test_option_names_are_a_decision():
    assert sorted(L2TConfig.__annotations__) == [
        "advantage_form",
        "answer_column",
        "answer_likelihood",
        "answer_probe",
        "answer_probe_end",
        "compression_coef",
        "correctness_estimator",
        "episode_format",
        "fisher_damping",
        "fisher_ema",
        "max_continuation_length",
        "max_episodes",
        "max_prompt_length",
        "num_continuations",
        "on_bad_row",
        "parameter_update",
        "penalty_unit",
        "process_reward_coef",
        "proxy_modules",
        "proxy_rank_ratio",
        "proxy_refresh_steps",
        "scoring_batch_size",
        "token_credit",
        "trim_fraction",
        "vllm_importance_sampling_mode",
        "weight_sync_dir",
    ]


def test_every_option_is_documented():
    for name, field in L2TConfig.__dataclass_fields__.items():
        if name in L2TConfig.__annotations__:
            assert f"        {name} (`" in L2TConfig.__doc__, name
            assert field.metadata["help"], name


def test_defaults_follow_the_paper():
    settings = config()
    assert (settings.process_reward_coef, settings.compression_coef) == (0.8, 0.6)
    assert (settings.fisher_damping, settings.trim_fraction, settings.max_episodes) == (1e-5, 0.05, 30)


def test_long_completions_keep_their_weight_with_vllm():
    assert config().vllm_importance_sampling_mode == "token_truncate"
