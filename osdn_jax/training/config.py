"""The configuration of a training run: every key with its default. Files in `configs/` change some of them.

`ranges.py` has the range of each number.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder


class ConfigError(ValueError):
    """A mistake in a configuration or on the command line; its message is shown to the user as it is."""


def default_config() -> ConfigDict:
    """Return the default configuration: a small Online Scaled DeltaNet on Shakespeare's works, byte by byte.

    Returns:
        A new ConfigDict, to change and to give to `train`.

    Example:
        >>> from osdn_jax.training import default_config
        >>> config = default_config()
        >>> config.model.rule = "gated_delta_net"
        >>> config.model.layers, config.optimizer.learning_rate
        (4, 0.003)
    """
    config = ConfigDict()
    config.seed = 0  # of the initial parameters, the data order and dropout
    config.steps = 1000  # optimiser updates; the learning rate's schedule ends with them
    config.batch_size = 16  # windows per step
    config.sequence_length = 256  # tokens per window
    config.accumulate = 1  # micro-batches per step (gradient accumulation); divides batch_size
    # A folder to start from, as `interop.load_pretrained` reads it: another library's model or one of ours. Its model
    # takes the place of most keys of config.model.
    config.init = ""
    config.ignore_remote_code = False  # load a folder of init whose config.json names Python code, without that code
    config.ema = 0.0  # decay of a moving average of the parameters, used for validation and sampling; 0: none
    config.max_skipped_steps = 10  # a step with a non-finite loss or gradient is skipped; more in a row end the run

    config.data = ConfigDict()
    # A .txt, .jsonl (or .gz, .xz of one) or .parquet file, or a folder of them; a folder of shards that
    # `python -m osdn_jax.data.prepare` wrote; hf:NAME streams a data set of the Hugging Face hub; "" is Shakespeare.
    config.data.path = ""
    config.data.mixture = ""  # instead of a path: path:weight,path:weight; a weight is a share of the windows
    config.data.tokenizer = "bytes"  # or a tokenizer.json, a SentencePiece .model, a folder with one, or init: its own
    config.data.field = "text"  # column of the text in .jsonl, .parquet and hf:
    config.data.subset = ""  # of hf:, such as sample-10BT
    config.data.split = "train"  # of hf:
    config.data.shuffle_windows = 256  # of hf:, size of the shuffle buffer in windows; 1: the stream's order
    config.data.validation_fraction = 0.1  # held-out share of files and prepared data; Shakespeare has held-out plays
    config.data.validation_documents = 1000  # of hf:, number of documents at its start that are held out
    config.data.validation_path = ""  # a text to validate on, as path but not hf:; then nothing else is held out
    # A recall task instead of a text, such as mqar:length=64,pairs=8 (docs/recall.md). It sets the sequence lengths.
    config.data.task = placeholder(str)
    config.data.task_examples = 100_000  # to train on, in memory: 8 bytes per token
    config.data.validation_task = placeholder(str)  # to validate on; default: the task, with other examples
    config.data.validation_examples = 3000

    config.model = ConfigDict()
    config.model.rule = "osdn"  # a key of osdn_jax.nn.RULES
    config.model.vocab_size = placeholder(int)  # default: the tokenizer's; may be larger
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 2
    config.model.key_heads = placeholder(int)  # default: heads
    config.model.key_dim = placeholder(int)  # per head; default: width / heads
    config.model.value_dim = placeholder(int)  # per head; default: width / heads
    config.model.mlp_dim = 344
    config.model.conv_size = 4  # taps of the delta rules' short convolution; the transformer has none
    config.model.tied_embeddings = True
    config.model.dropout = 0.0
    config.model.dtype = "float32"  # of activations and matrix products: float32 or bfloat16
    config.model.remat = "none"  # recomputed for the gradient: none, blocks (all but weight products), full
    config.model.output_gate = placeholder(bool)  # default: the rule's
    config.model.negative_eigenvalues = False  # beta, or the erase gate, in (0, 2) instead of (0, 1)
    config.model.preset = placeholder(str)  # of the hypergradient preconditioner: paper or trust; default: the rule's
    config.model.beta_aware = placeholder(bool)  # its feedback uses beta instead of 1; default: the rule's
    config.model.eta = placeholder(float)  # its step size; 0 for a learned constant; default: the preset's
    config.model.initial = placeholder(float)  # start of its learned d_0; default: the preset's
    config.model.forget = True  # Adaptive Preconditioner Forgetting
    config.model.forget_gate = "token"  # per token and head; or head: learned per head; constant: forget_constant
    config.model.forget_constant = 0.999  # share that a constant gate keeps per token
    config.model.anchor = placeholder(float)  # what forgetting pulls the preconditioner toward; default: the preset's
    config.model.squash = placeholder(float)  # x of the Gram preconditioner: factors in [1/x, x]; default: the rule's
    config.model.match_step = False  # a control: the preconditioner's step size without its direction
    config.model.key_norm = True  # unit keys of the delta rules
    config.model.fixed_beta = placeholder(float)  # beta of every token; default: a learned gate
    config.model.output_gate_rank = placeholder(int)  # of an output gate of low rank
    config.model.output_gate_bias = False
    config.model.output_gate_activation = "silu"  # or sigmoid
    config.model.decay_rank = placeholder(int)  # of a decay per channel; default: key_dim
    # Attention: of the rule transformer, and of a hybrid's attention blocks.
    config.model.attention_every = placeholder(int)  # a hybrid: every n-th block is attention; default: none
    config.model.attention_norm = "pre"  # or post: x + norm(f(x)), in a hybrid's attention blocks
    config.model.attention_heads = placeholder(int)  # of a hybrid's attention; default: heads
    config.model.attention_key_heads = placeholder(int)  # of a hybrid's attention; default: attention_heads
    config.model.attention_gate = False  # output gate of a hybrid's attention
    config.model.positions = "rotary"  # or none
    config.model.rotary_base = 10_000.0  # of rotary positions
    config.model.rotary_dim = placeholder(int)  # channels of each head that are rotated; default: all
    config.model.window = placeholder(int)  # tokens that each token sees; default: all
    config.model.qk_norm = False
    config.model.qk_norm_over = "head"  # or all: one norm over the channels of all heads
    config.model.max_length = placeholder(int)  # tokens in the key-value cache; default: sequence_length
    # A mixture of experts in place of the MLPs.
    config.model.experts = placeholder(int)  # number of experts; default: no mixture
    config.model.active_experts = 2  # that each token is sent to
    config.model.expert_dim = placeholder(int)  # hidden units of an expert; default: mlp_dim
    config.model.shared_expert_dim = 0  # hidden units of an expert that every token is sent to; 0: none
    config.model.shared_expert_gate = False
    config.model.router = "softmax"  # or sigmoid
    config.model.dense_layers = 0  # blocks at the start that keep their MLP
    # JSON of an nn.ModelConfig, in place of all sizes and options above but dropout, dtype and remat; set by init.
    config.model.stack = placeholder(str)
    config.model.chunk_size = placeholder(int)  # of the rule; default: by measurement
    config.model.implementation = placeholder(str)  # of the rule; default: the fastest available (transformer: chunk)

    config.loss = ConfigDict()
    config.loss.sequence_chunk = 512  # tokens of each window per block of logits
    config.loss.vocabulary_chunk = 8192  # vocabulary entries per block of logits
    config.loss.balance = 0.01  # coefficient of the load-balancing loss of mixtures of experts (arXiv 2101.03961)
    config.loss.z_loss = 0.0  # coefficient of the mean of logsumexp(logits)^2; not part of the reported loss

    config.surgery = ConfigDict()  # what `interop.replace_rule` changes in the model of init
    config.surgery.preconditioner = placeholder(str)  # hypergradient, gram or none; default: as it is
    config.surgery.decay = placeholder(str)  # scalar or channel; default: as it is
    config.surgery.layers = ""  # numbers of the blocks, such as 0,1,-1; default: all with a delta rule

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or muon: Muon for the weight matrices of the blocks, AdamW for the rest
    config.optimizer.learning_rate = 3e-3  # at the peak of the schedule
    config.optimizer.muon_learning_rate = 2e-2  # at the peak, for Muon's matrices
    config.optimizer.muon_momentum = 0.95
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1  # of the peak, at the end of the cosine
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0  # of the gradient over all parameters; inf: no clipping

    config.validation = ConfigDict()
    config.validation.every = 250  # steps
    config.validation.windows = 64  # per evaluation, evenly spaced (the last step uses all); 0: always all
    config.validation.batch_size = 16
    config.validation.sequence_length = 1024  # tokens; a recurrence can read further than it was trained

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 250  # steps
    config.checkpoint.keep = 3  # number of newest checkpoints kept
    config.checkpoint.keep_every = placeholder(int)  # also keep each multiple of this many steps; default: none

    config.mesh = ConfigDict()  # devices along each axis; one may be -1: all remaining devices
    config.mesh.data = 1  # copies of the model; each takes some of the rows
    config.mesh.fsdp = 1  # devices that shard parameters and optimiser state; each takes some of the rows
    config.mesh.tensor = 1  # devices that shard the heads and hidden units
    config.mesh.context = 1  # devices that shard the tokens of each window

    config.log_every = 10  # steps
    config.hang_seconds = 1800  # abort if no step completes within this time; 0: never
    return config


# What may change when a run is resumed: nothing that the result depends on, up to the order of sums over a mesh.
MAY_CHANGE_ON_RESUME = ("log_every", "checkpoint", "validation", "max_skipped_steps", "mesh", "hang_seconds")


@dataclasses.dataclass(frozen=True)
class Absent:
    """The value of a key that one of two configurations does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


def flatten(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """Return {dotted key: value} of every leaf; an empty sub-configuration counts as a leaf."""

    def items(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, ConfigDict | FrozenConfigDict):
            value = value.to_dict()
        if not isinstance(value, dict) or (prefix and not value):
            yield prefix, value
            return
        for key, inner in value.items():
            yield from items(f"{prefix}.{key}" if prefix else str(key), inner)

    return dict(items("", config))
