"""Training on of a pretrained model: another library's checkpoint, one of ours, or a run of train.py saved as a folder.

    python train.py --config=configs/finetune.py --config.init=PATH --config.data.path=mine.txt --workdir=runs/mine

PATH is a folder that `osdn_jax.interop.load_pretrained` reads (docs/interop.md); its tokenizer is used, and its model
takes the place of most keys of config.model. To change the rule first (docs/rule-surgery.md):

    python train.py --config=configs/finetune.py --config.init=PATH --config.surgery.preconditioner=gram ...

The parameters are trained in float32; the new ones of a changed rule learn at the same rate as all.
"""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: seed=, steps=, batch_size=, length= (tokens of a window) of the run."""
    given = parse_arg(arg, seed=0, steps=1000, batch_size=16, length=1024)
    config = default_config()
    config.seed, config.steps, config.batch_size = given.seed, given.steps, given.batch_size
    config.sequence_length = config.validation.sequence_length = given.length
    config.data.tokenizer = "init"
    config.model.remat = "blocks"
    config.mesh.fsdp = -1
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = given.steps // 20
    config.optimizer.weight_decay = 0.01
    config.validation.batch_size = given.batch_size
    return config
