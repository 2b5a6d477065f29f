"""Shapes of decoder-only models: of those that recipes name, and of local folders. No weights are needed."""

import json
from dataclasses import dataclass
from pathlib import Path

from l2t_trl.errors import UserError


# Architectures whose layers are those that [`Shape`] counts.
COUNTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """
    What the size of a Qwen2 or Llama model follows from.

    Attributes:
        hidden_size (`int`): width H of the residual stream.
        num_layers (`int`): decoder layers.
        num_heads (`int`): query heads.
        num_key_value_heads (`int`): key and value heads.
        intermediate_size (`int`): width F of the MLP.
        vocab_size (`int`): rows V of the embedding.
        is_tied (`bool`): whether lm_head and embedding share their weight.
        head_dim (`int`): width of a head.
        has_qkv_bias (`bool`): whether query, key and value projections have biases (Qwen2) or not (Llama).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    head_dim: int
    has_qkv_bias: bool = True

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all keys, which is that of all values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def head_parameters(self) -> int:
        """Weights of lm_head, tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Output and input width of each linear layer of a decoder layer."""
        hidden, queries, keys = self.hidden_size, self.query_size, self.key_value_size
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (self.intermediate_size, hidden),
            "up_proj": (self.intermediate_size, hidden),
            "down_proj": (hidden, self.intermediate_size),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer."""
        biases = self.query_size + 2 * self.key_value_size if self.has_qkv_bias else 0
        return sum(outputs * inputs for outputs, inputs in self.linear_sizes.values()) + 2 * self.hidden_size + biases

    @property
    def parameters_behind_first_layer(self) -> int:
        """Parameters of the second layer and all after it: those with gradients when only the first layer is left."""
        return (self.num_layers - 1) * self.layer_parameters + self.hidden_size + self.head_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        embedding = 0 if self.is_tied else self.head_parameters
        return self.parameters_behind_first_layer + self.layer_parameters + embedding

    def cache_elements(self, num_tokens: int) -> int:
        """Elements of the key-value cache of `num_tokens` tokens."""
        return 2 * self.num_layers * self.key_value_size * num_tokens


_QWEN_1_5B = Shape(1536, 28, 12, 2, 8960, 151936, False, 128)
_QWEN_7B = Shape(3584, 28, 28, 4, 18944, 152064, False, 128)
# As the models' config.json have it.
KNOWN_SHAPES = {
    "agentica-org/DeepScaleR-1.5B-Preview": _QWEN_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B,
    "Qwen/Qwen2-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(896, 24, 14, 2, 4864, 151936, True, 64),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(1536, 28, 12, 2, 8960, 151936, True, 128),
    "Qwen/Qwen2.5-3B-Instruct": Shape(2048, 36, 16, 2, 11008, 151936, True, 128),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152, True, 64, has_qkv_bias=False),
}


def find_shape(name_or_path: str | None) -> Shape:
    """
    Return the shape of a model, from the table or from the config.json of a local folder.

    Args:
        name_or_path (`str`, *optional*):
            As `model_name_or_path`: `"tiny"`, `"smollm2"`, a local folder, or a Hub id of [`KNOWN_SHAPES`].

    Raises:
        UserError: if it is neither, or a model of another architecture.
    """
    from l2t_trl.models import TINY_FOLDER

    if not name_or_path:
        raise UserError("model_name_or_path is not set: name a local folder, a Hub id, tiny or smollm2.")
    if name_or_path in KNOWN_SHAPES:
        return KNOWN_SHAPES[name_or_path]
    folder = TINY_FOLDER if name_or_path == "tiny" else Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model_name_or_path {name_or_path} is no local folder, nor among the models whose shape is known here: "
            f"{', '.join(KNOWN_SHAPES)}. Set it to a folder with the model's config.json."
        )
    return read_shape(folder / "config.json")


def read_shape(path: Path) -> Shape:
    """
    Read a model's shape from its config.json.

    Raises:
        UserError: if the file cannot be read, or describes a model whose layers are not counted here.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    model_type = config.get("model_type")
    if model_type not in COUNTED_TYPES:
        raise UserError(
            f"{path}: model_type must be one of {', '.join(COUNTED_TYPES)} for a plan, got {model_type!r}."
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            is_tied=config.get("tie_word_embeddings", False),
            head_dim=config.get("head_dim") or hidden // heads,
            has_qkv_bias=model_type == "qwen2" or config.get("attention_bias", False),
        )
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}.") from error
