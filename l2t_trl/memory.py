r"""
What a training step holds in memory, by plain arithmetic.

A step is a sequence of phases: rollouts, scoring, the backward pass, the optimiser's step. Some things lie in memory
all the time (weights, optimiser state, an engine that shares the GPU), the rest belongs to its phase, so the peak is
what is always there plus the largest phase. docs/memory.md compares it with measured peaks and says what is counted.

Legend: H hidden size, F MLP width, V vocabulary, P parameters, T trainable ones, N processes.
"""

from dataclasses import dataclass

from l2t_trl.model_shapes import Shape


GIB = 2**30

# Context, kernels and communicators of a process on a GPU; Python and libraries of one on a CPU. Not ours to count: usual
# sizes (of the latter 0.66 GiB were seen, see docs/memory.md).
CUDA_BYTES, LIBRARY_BYTES = int(1.5 * GIB), int(0.7 * GIB)
CONTEXT, LIBRARIES = "CUDA context", "Python and libraries"
# TRL's fused lm_head projects tiles of so many tokens and so many columns.
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768
# Without Triton a tile's gradient takes fp32 temporaries of its size (logits, logits over temperature, their log
# probabilities and probabilities, the gradient, the targets and their difference) and the targets as booleans.
HEAD_TEMPORARY_BYTES = 7 * 4 + 1
# Elements of DeepSpeed's buckets, of gathered weights, and of what its optimiser steps at once under ZeRO-3.
BUCKET, LIVE_PARAMETERS, SUB_GROUP = 5 * 10**8, 10**9, 10**9
# Elements of the scoring pass's chunk of logits on a GPU and on a CPU (see l2t_trl/scoring.py), and its copies.
SCORING_CHUNK, SCORING_CPU_CHUNK, SCORING_COPIES = 2**25, 2**21, 3
# vLLM keeps so much of its share for its own activations (4,096 tokens at a time) and graphs.
VLLM_WORK_BYTES = 2 * GIB
# Half a bf16 step of a usual weight (0.02): smaller updates leave it as it was.
LOST_UPDATE = 6e-5
LOST_UPDATES = (
    "dtype bfloat16 without DeepSpeed keeps no weights in fp32, and updates as small as learning_rate are rounded away: "
    "choose an accelerate_config with DeepSpeed (zero2, zero3), or set dtype to float32."
)
CASTS = "bf16 casts of weights"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class Setup:
    """
    What the memory of one process depends on, beside the model.

    Attributes:
        num_processes (`int`): N.
        is_gpu (`bool`): whether the work runs on GPUs.
        device_bytes (`int`): memory of one device.
        dtype (`str`): data type that the model is loaded in.
        is_mixed (`bool`): whether it runs in bf16 beside fp32 (autocast, or DeepSpeed's bf16 mode).
        zero_stage (`int`, *optional*): DeepSpeed's ZeRO stage; `None` without DeepSpeed.
        offloads_optimizer, offloads_parameters (`bool`): whether DeepSpeed keeps them in CPU memory.
        batch_size (`int`): completions in one forward pass of a process.
        accumulation (`int`): such passes per optimiser step.
        rollout_batch_size (`int`): completions that a process generates at once.
        prompt_length, completion_length (`int`): longest ones in tokens.
        checkpoints_activations (`bool`): `gradient_checkpointing`.
        is_flash (`bool`): whether attention takes padding without a mask (flash_attention_2).
        has_reference (`bool`): whether there is a reference model (`beta` above 0, without adapters).
        adapter_parameters (`int`, *optional*): parameters of the LoRA adapters; `None` trains all.
        adapter_inputs (`int`): widths of what the adapters of one layer read, together.
        uses_vllm (`bool`): whether rollouts come from vLLM, here or elsewhere.
        vllm_share (`float`, *optional*): share of the device that a colocated vLLM takes; `None` without.
        vllm_sleeps (`bool`): whether it gives that share back while the model trains.
        vllm_tensor_parallel (`int`): GPUs that share one engine.
        vllm_length (`int`, *optional*): longest sequence of the engine.
        scoring_batch_size (`int`, *optional*): completions that L2T scores at once; `None` for plain GRPO.
        num_probe_tokens (`int`): tokens of all probes and answers of a completion.
    """

    num_processes: int = 1
    is_gpu: bool = True
    device_bytes: int = 80 * GIB
    dtype: str = "float32"
    is_mixed: bool = True
    zero_stage: int | None = None
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    batch_size: int = 8
    accumulation: int = 1
    rollout_batch_size: int = 8
    prompt_length: int = 512
    completion_length: int = 256
    checkpoints_activations: bool = True
    is_flash: bool = False
    has_reference: bool = False
    adapter_parameters: int | None = None
    adapter_inputs: int = 0
    uses_vllm: bool = False
    vllm_share: float | None = None
    vllm_sleeps: bool = False
    vllm_tensor_parallel: int = 1
    vllm_length: int | None = None
    scoring_batch_size: int | None = None
    num_probe_tokens: int = 0

    @property
    def length(self) -> int:
        """Longest prompt and completion in tokens."""
        return self.prompt_length + self.completion_length

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights are trained, rather than adapters beside them."""
        return self.adapter_parameters is None

    @property
    def autocasts(self) -> bool:
        """Whether products of fp32 weights are made in bf16."""
        return self.weight_bytes > self.compute_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the forward pass finds it; DeepSpeed's bf16 mode casts the model."""
        return 2 if self.zero_stage is not None and self.is_mixed else DTYPE_BYTES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element that a matrix product puts out."""
        return 2 if self.is_mixed else self.weight_bytes


@dataclass(frozen=True)
class Plan:
    """
    Memory of one process, in bytes by what it is for.

    Attributes:
        resident (`dict[str, int]`): always there.
        phases (`dict[str, dict[str, int]]`): there during one phase only.
        host (`dict[str, int]`): in CPU memory, by offloading.
        engine_tokens (`int`, *optional*): tokens that the colocated engine's key-value cache holds.
    """

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    engine_tokens: int | None = None

    @property
    def peak_phase(self) -> str:
        """Name of the phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Largest sum of what is there at once."""
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())


def make_plan(shape: Shape, setup: Setup) -> Plan:
    """
    Return what training takes on each device.

    Args:
        shape ([`~l2t_trl.model_shapes.Shape`]):
            The model.
        setup ([`Setup`]):
            How it is trained.
    """
    resident, gradients, step, host = _model_state(shape, setup)
    resident |= {CONTEXT: CUDA_BYTES} if setup.is_gpu else {LIBRARIES: LIBRARY_BYTES}
    phases = {"rollouts": _rollouts(shape, setup)}
    engine_tokens = None
    if setup.vllm_share is not None:
        share = int(setup.vllm_share * setup.device_bytes)
        (phases["rollouts"] if setup.vllm_sleeps else resident)["vLLM's share"] = share
        weights = 2 * shape.num_parameters // setup.vllm_tensor_parallel
        per_token = 2 * shape.cache_elements(1) // setup.vllm_tensor_parallel
        engine_tokens = max(0, share - weights - VLLM_WORK_BYTES) // per_token
    if setup.scoring_batch_size is not None:
        phases["scoring"] = _scoring(shape, setup)
    phases = _with_casts(phases | _pass(shape, setup, gradients), shape, setup)
    phases["optimiser step"] = {"gradients": gradients} | step
    return Plan(resident, phases, host, engine_tokens)


def loses_updates(dtype: str | None, learning_rate: float) -> bool:
    """Whether steps of a learning rate are rounded away in weights of a data type that none in fp32 stand beside."""
    return dtype == "bfloat16" and learning_rate < LOST_UPDATE


def trainable_parameters(shape: Shape, setup: Setup) -> int:
    """Number T of the parameters that are trained."""
    return shape.num_parameters if setup.adapter_parameters is None else setup.adapter_parameters


def adapter_parameters(shape: Shape, rank: int, modules: list[str]) -> int:
    """Parameters of LoRA adapters of a rank on the named linear layers of every decoder layer."""
    return shape.num_layers * sum(rank * sum(shape.linear_sizes[name]) for name in modules)


def _model_state(shape: Shape, setup: Setup) -> tuple[dict[str, int], int, dict[str, int], dict[str, int]]:
    """What is always there, the gradients, what the optimiser's step takes beside, and what lies in CPU memory."""
    parameters, trainable = shape.num_parameters, trainable_parameters(shape, setup)
    itemsize, shards, stage = setup.weight_bytes, setup.num_processes, setup.zero_stage
    host, step = {}, {}
    if stage is None:
        # Adapters are trained in fp32 whatever the model's data type.
        trained = itemsize if setup.trains_weights else 4
        resident = {"weights": parameters * itemsize, "optimiser state": 2 * trainable * trained}
        if not setup.trains_weights:
            resident["adapters"] = trainable * trained
        gradients = trainable * trained
        if shards > 1:
            resident["gradient buckets (DDP)"] = gradients
        if setup.has_reference:
            resident["reference model"] = parameters * itemsize
        return resident, gradients, step, host

    weight_shards = shards if stage == 3 else 1
    state_shards = shards if stage >= 1 else 1
    resident = {}
    weights = {"weights": parameters * itemsize // weight_shards}
    state = {"fp32 weights": 4 * trainable // state_shards, "optimiser state": 8 * trainable // state_shards}
    if setup.has_reference:
        resident["reference model"] = parameters * itemsize // weight_shards
    # ZeRO-1 keeps whole gradients until they are reduced, and its part of the result.
    gradients = trainable * itemsize // state_shards + (trainable * itemsize if stage < 2 else 0)
    fp32_gradients = 4 * min(trainable // state_shards, SUB_GROUP if stage == 3 else trainable)
    if setup.offloads_optimizer:
        host |= state | {"gradients": 4 * trainable // state_shards}
        gradients = 0 if stage == 3 else gradients
    else:
        resident |= state
        step["gradients in fp32"] = fp32_gradients
    (host if setup.offloads_parameters else resident).update(weights)
    buckets = itemsize * min(BUCKET, trainable) * (1 if stage == 3 else 2)
    resident["communication buckets"] = buckets
    if stage == 3:
        resident["gathered weights"] = itemsize * min(LIVE_PARAMETERS, parameters)
    return resident, gradients, step, host


def _with_casts(phases: dict[str, dict[str, int]], shape: Shape, setup: Setup) -> dict[str, dict[str, int]]:
    """The phases with autocast's casts of the layers' weights; without any, a pass holds most on its way back."""
    if not setup.autocasts:
        return {name: held for name, held in phases.items() if name != "forward"}
    casts = setup.compute_bytes * shape.num_layers * shape.layer_parameters
    # They are there until a forward pass ends, and kept for the one back unless the layers are run anew.
    anew = ("backward, lm_head", "backward, layers") if setup.checkpoints_activations else ()
    return {name: held if name in anew else held | {CASTS: casts} for name, held in phases.items()}


def _layer_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes per token that one decoder layer keeps for its backward pass."""
    compute = setup.compute_bytes
    # Query, output, and keys and values, which only flash attention does not repeat for every query head.
    keys = shape.key_value_size if setup.is_flash else shape.query_size
    attention = 2 * compute * (shape.query_size + keys) + 4 * shape.num_heads
    mlp = 3 * compute * shape.intermediate_size  # gate, its activation, up
    return 2 * _norm_bytes(shape, setup) + attention + mlp + _read_bytes(shape, setup) + _mask_bytes(setup)


def _norm_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes per token that a norm keeps: its input in fp32 and, where its weight is trained, that normalised."""
    return shape.hidden_size * (4 + (setup.weight_bytes if setup.trains_weights else 0))


def _read_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes per token that a layer's linear layers keep of what they read, beyond what attention keeps anyway."""
    compute = setup.compute_bytes
    if not setup.trains_weights:
        # Every adapter drops out anew, and keeps what is left and what was dropped: as booleans, by a CPU as fp32.
        return setup.adapter_inputs * (compute + (1 if setup.is_gpu else 4))
    # What a norm puts out is shared, but for autocast, which casts it anew for query, key, value; gate, up.
    copies = 5 if setup.autocasts else 2
    return compute * (copies * shape.hidden_size + shape.intermediate_size)


def _mask_bytes(setup: Setup) -> int:
    """Bytes per token of the mask that SDPA makes of padding for every layer, a row as long as the sequence."""
    return 0 if setup.is_flash else setup.compute_bytes * setup.length


def _passing_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes per token that one decoder layer takes while it runs without gradients."""
    return 3 * setup.compute_bytes * shape.intermediate_size + 3 * 4 * shape.hidden_size


def _pass(shape: Shape, setup: Setup, gradients: int) -> dict[str, dict[str, int]]:
    """The forward pass at its end, and the backward pass where it begins (lm_head) and as it goes through the layers."""
    tokens, stream = setup.batch_size * setup.length, setup.weight_bytes
    layer, inputs = tokens * _layer_bytes(shape, setup), tokens * stream * shape.hidden_size
    kept_of_each, again = (inputs, layer) if setup.checkpoints_activations else (layer, 0)
    kept = shape.num_layers * kept_of_each + tokens * _norm_bytes(shape, setup)
    mask = 0 if setup.is_flash else setup.batch_size * setup.length**2
    # Of the first pass of a step no gradients are there yet when it begins.
    earlier = gradients if setup.accumulation > 1 else 0
    held = {"activations": kept, "attention mask": mask, "gradients": earlier}
    head = held | _head(shape, setup)
    if not earlier:
        # What is kept is given up as gradients come, layer by layer: most is there in the last layer or in the first.
        last = kept, gradients * shape.head_parameters // shape.num_parameters
        first = kept_of_each, gradients * shape.parameters_behind_first_layer // shape.num_parameters
        kept, gradients = max(last, first, key=sum)
    activations = kept + again + tokens * _leaving_bytes(shape, setup)
    return {
        "forward": held | {"lm_head: tile": head["lm_head: tile"]},
        "backward, lm_head": head,
        "backward, layers": {"activations": activations, "attention mask": mask, "gradients": gradients},
    }


def _leaving_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes per token of the gradients at the MLP (of what it keeps, and of the stream), or at a norm in fp32."""
    mlp = 2 * setup.compute_bytes * shape.intermediate_size + 2 * setup.weight_bytes * shape.hidden_size
    if setup.is_mixed and setup.adapter_inputs >= shape.intermediate_size:
        # Of what the adapter of down_proj reads, in fp32, before and behind its dropout.
        mlp += 2 * 4 * shape.intermediate_size
    return max(mlp, 6 * 4 * shape.hidden_size)


def _head(shape: Shape, setup: Setup) -> dict[str, int]:
    """The fused lm_head: no (tokens x vocabulary) logits, but gradients of weight and hidden states in fp32."""
    # Without Triton prompt tokens are projected, too.
    tokens = setup.batch_size * (setup.completion_length if setup.is_gpu else setup.length)
    rows, columns, compute = min(tokens, HEAD_TOKENS), min(HEAD_COLUMNS, shape.vocab_size), setup.compute_bytes
    # Of a tile that is wider than the vocabulary a CPU gives memory to the columns that are used.
    tile = rows * compute * HEAD_COLUMNS if setup.is_gpu else rows * columns * (compute + HEAD_TEMPORARY_BYTES)
    if setup.autocasts:
        tile += columns * shape.hidden_size * compute  # autocast's cast of the rows of the weight
    # Gradients are summed in fp32, and then cast.
    cast = setup.weight_bytes if setup.weight_bytes < 4 else 0
    hidden = tokens * shape.hidden_size * (setup.weight_bytes + 4 + cast)
    weight = (4 + cast) * shape.head_parameters if setup.trains_weights else 0
    return {"lm_head: tile": tile, "lm_head: hidden states": hidden, "lm_head: gradient": weight}


def _rollouts(shape: Shape, setup: Setup) -> dict[str, int]:
    """Generation by transformers; with vLLM, the pass that reads the old log-probabilities."""
    passing = _passing_bytes(shape, setup)
    if setup.uses_vllm:
        return {"old log-probabilities": setup.batch_size * setup.length * (passing + 4 * shape.hidden_size)}
    sequences = setup.rollout_batch_size
    cache = setup.compute_bytes * shape.cache_elements(sequences * setup.length)
    held = {
        # Every token's keys and values are put behind those of one layer at a time.
        "key-value cache": cache + cache // shape.num_layers,
        "prompts, one layer": sequences * setup.prompt_length * passing,
        "logits and probabilities": 4 * 4 * sequences * shape.vocab_size,
    }
    if setup.zero_stage == 3:
        held["gathered weights for generation"] = setup.weight_bytes * shape.num_parameters
    return held


def _scoring(shape: Shape, setup: Setup) -> dict[str, int]:
    """L2T's scoring pass, or the decomposition of its proxy where that takes more."""
    rows, compute = setup.scoring_batch_size, setup.compute_bytes
    tokens, probes = rows * setup.length, rows * setup.num_probe_tokens
    cache = compute * shape.cache_elements(tokens + probes)
    width = shape.vocab_size + 4 * shape.intermediate_size
    chunk = max(SCORING_CHUNK if setup.is_gpu else SCORING_CPU_CHUNK, 16 * width)
    held = {
        "key-value cache": cache + cache // shape.num_layers,
        "hidden states and what enters the tail": 3 * tokens * setup.weight_bytes * shape.hidden_size,
        "one layer": tokens * _passing_bytes(shape, setup),
        # As a boolean, and as SDPA turns it into one to add.
        "probe mask": probes * (setup.length + setup.num_probe_tokens) * (1 + compute),
        "logits of a chunk": SCORING_COPIES * 4 * chunk,
    }
    if setup.zero_stage == 3:
        tail = 3 * shape.hidden_size * shape.intermediate_size + shape.head_parameters
        held["gathered tail"] = setup.weight_bytes * tail
    # Of one of the MLP's matrices at a time, in fp32: itself, its copy, U, V and as much to work with.
    decomposition = {"singular vectors": 6 * 4 * shape.hidden_size * shape.intermediate_size}
    return max(held, decomposition, key=lambda items: sum(items.values()))
