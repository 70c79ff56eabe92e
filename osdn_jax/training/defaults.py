"""The configuration of a training run, with every key that it may have; files in `configs/` change some of them."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """A small Online Scaled DeltaNet on Shakespeare's works, byte by byte."""
    config = ConfigDict()
    config.seed = 0  # of the parameters, the order of the data and dropout
    config.steps = 1000
    config.batch_size = 16  # windows per step
    config.sequence_length = 256  # tokens per window

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
    config.model.conv_size = 4
    config.model.tied_embeddings = True
    config.model.dropout = 0.0
    config.model.dtype = "float32"  # of activations and products: float32 or bfloat16
    config.model.output_gate = placeholder(bool)  # default: as the rule has it
    config.model.negative_eigenvalues = False
    config.model.preset = placeholder(str)  # of the hypergradient preconditioner: paper or trust; default by rule
    config.model.forget = True  # Adaptive Preconditioner Forgetting
    config.model.anchor = placeholder(float)  # what it forgets toward; default by preset
    config.model.chunk_size = placeholder(int)
    config.model.implementation = placeholder(str)  # of the delta rule; default the fastest

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-3  # at its peak
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1  # of the peak, at the end of the cosine
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.clip_norm = 1.0  # of the gradient over all parameters

    config.validation = ConfigDict()
    config.validation.every = 250  # steps
    config.validation.windows = 64  # spread over the held-out text, until the last step takes all; 0: always all
    config.validation.batch_size = 16
    config.validation.sequence_length = 1024  # tokens; a recurrence may read further than it was trained

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 250  # steps
    config.checkpoint.keep = 3  # of the newest

    config.log_every = 10  # steps
    return config


# What may change when a run is resumed: nothing that the result depends on.
MAY_CHANGE_ON_RESUME = ("log_every", "checkpoint", "validation")
