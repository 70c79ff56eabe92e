"""The configuration of a training run, with every key that it may have; files in `configs/` change some of them.

What each number may be is in `ranges.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """A small Online Scaled DeltaNet on Shakespeare's works, byte by byte."""
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data and dropout
    config.steps = 1000
    config.batch_size = 16  # windows per step
    config.sequence_length = 256  # tokens per window
    config.accumulate = 1  # parts that a step's windows are taken in, one after another; divides batch_size
    config.ema = 0.0  # decay of the parameters' moving average, which is then what is validated and drawn from; 0: none
    config.max_skipped_steps = 10  # steps in a row without finite numbers, which change nothing; one more ends the run

    config.data = ConfigDict()
    # A .txt, .jsonl (or .gz, .xz of one) or .parquet file, or a folder of them; a folder of shards that
    # `python -m osdn_jax.data.prepare` wrote; hf:NAME streams a data set of the Hugging Face hub; "" is Shakespeare.
    config.data.path = ""
    config.data.mixture = ""  # instead of a path: path:weight,path:weight; weights are shares of the windows
    config.data.tokenizer = "bytes"  # or a tokenizer.json, a SentencePiece .model, or a folder with one of them
    config.data.field = "text"  # of the rows of .jsonl, .parquet and hf:
    config.data.subset = ""  # of hf:, such as sample-10BT
    config.data.split = "train"  # of hf:
    config.data.shuffle_windows = 256  # of hf:, how many windows are shuffled together; 1: the order of the stream
    config.data.validation_fraction = 0.1  # of files and prepared data; Shakespeare has his own held-out plays
    config.data.validation_documents = 1000  # of hf:, how many of its first documents are held out
    config.data.validation_path = ""  # a text to validate on, as path but for hf:; then nothing else is held out

    config.model = ConfigDict()
    config.model.rule = "osdn"  # a key of osdn_jax.nn.RULES
    config.model.vocab_size = placeholder(int)  # default: of the tokenizer; it may be larger than that
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 2
    config.model.key_heads = placeholder(int)  # default: as many as heads
    config.model.key_dim = placeholder(int)  # per head; default width / heads
    config.model.value_dim = placeholder(int)  # per head; default width / heads
    config.model.mlp_dim = 344
    config.model.conv_size = 4  # of the delta rules; the transformer has no convolution
    config.model.tied_embeddings = True
    config.model.dropout = 0.0
    config.model.dtype = "float32"  # of activations and products: float32 or bfloat16
    config.model.remat = "none"  # computed again for the gradient: none, blocks (all but weight products), full
    config.model.output_gate = placeholder(bool)  # default: as the rule has it
    config.model.negative_eigenvalues = False
    config.model.preset = placeholder(str)  # of the hypergradient preconditioner: paper or trust; default by rule
    config.model.forget = True  # Adaptive Preconditioner Forgetting
    config.model.anchor = placeholder(float)  # what it forgets toward; default by preset
    config.model.rotary_base = 10_000.0  # of the transformer's positions
    config.model.qk_norm = False  # of the transformer
    config.model.max_length = placeholder(int)  # tokens that the transformer's state holds; default sequence_length
    config.model.chunk_size = placeholder(int)
    config.model.implementation = placeholder(str)  # default: of the delta rules the fastest, of the transformer chunk

    config.loss = ConfigDict()
    config.loss.sequence_chunk = 512  # tokens of each window whose logits exist at a time
    config.loss.vocabulary_chunk = 8192  # words whose logits exist at a time
    config.loss.z_loss = 0.0  # coefficient of the mean of logsumexp(logits)^2; the reported loss is without it

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or muon: the blocks' matrices by Muon, all else by AdamW
    config.optimizer.learning_rate = 3e-3  # at its peak
    config.optimizer.muon_learning_rate = 2e-2  # at its peak, of the matrices
    config.optimizer.muon_momentum = 0.95
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1  # of the peak, at the end of the cosine
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0  # of the gradient over all parameters; inf: no clipping

    config.validation = ConfigDict()
    config.validation.every = 250  # steps
    config.validation.windows = 64  # spread over the held-out text, until the last step takes all; 0: always all
    config.validation.batch_size = 16
    config.validation.sequence_length = 1024  # tokens; a recurrence may read further than it was trained

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 250  # steps
    config.checkpoint.keep = 3  # of the newest
    config.checkpoint.keep_every = placeholder(int)  # steps whose checkpoints are kept besides; default: none

    config.mesh = ConfigDict()  # devices along each axis; one may be -1: all that are left
    config.mesh.data = 1  # copies of the model, each with rows of its own
    config.mesh.fsdp = 1  # devices that have rows of their own and share one copy's parameters and optimiser
    config.mesh.tensor = 1  # devices that share the heads and hidden units
    config.mesh.context = 1  # devices that share the tokens of each window

    config.log_every = 10  # steps
    config.hang_seconds = 1800  # a process in which nothing moves for so long ends with an error; 0: never
    return config


# What may change when a run is resumed: nothing that the result depends on, up to the order of sums over a mesh.
MAY_CHANGE_ON_RESUME = ("log_every", "checkpoint", "validation", "max_skipped_steps", "mesh", "hang_seconds")
