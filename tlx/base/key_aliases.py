"""What other training codes call their settings, and where tlx has them: for who types `lr=` or `batch_size=`."""

from __future__ import annotations

from collections.abc import Mapping

USUAL: Mapping[str, str] = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "blr", "init_lr", "max_lr"), "phases.each.lr"),
    **dict.fromkeys(("epoch", "epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs"), "duration=20ep"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "total_steps", "iters", "iterations", "max_iter"), "duration"),
    **dict.fromkeys(("bs", "batch_size", "global_batch_size", "train_batch_size"), "data.batch"),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size", "batch_size_per_gpu"), "loop.micro_batch"),
    **dict.fromkeys(
        ("grad_accum", "grad_accumulation", "gradient_accumulation_steps", "accum_iter"), "loop.micro_batch"
    ),
    **dict.fromkeys(("eval_batch_size", "val_batch_size", "per_device_eval_batch_size"), "evaluate.batch"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "train_dir", "train_data", "train_path"), "data.train"),
    **dict.fromkeys(("val_dir", "val_data", "val_path", "validation"), "data.val"),
    **dict.fromkeys(("test_dir", "test_data", "test_path"), "data.test"),
    **dict.fromkeys(("image_size", "img_size", "imgsz", "input_size", "resolution", "crop_size"), "input.size"),
    **dict.fromkeys(("in_chans", "in_channels", "num_channels"), "input.channels"),
    **dict.fromkeys(("augment", "augmentation", "augmentations", "aug", "transform"), "transforms"),
    **dict.fromkeys(("mixup_alpha",), "mix.mixup"),
    **dict.fromkeys(("cutmix_alpha",), "mix.cutmix"),
    **dict.fromkeys(("model", "arch", "architecture", "net", "network", "encoder", "model_name"), "backbone.name"),
    **dict.fromkeys(("pretrained", "checkpoint_path", "init_checkpoint", "pretrained_weights"), "backbone.weights"),
    **dict.fromkeys(("checkpoint_key", "model_key"), "backbone.weights_key"),
    **dict.fromkeys(("strict", "load_strict"), "backbone.allow"),
    **dict.fromkeys(("drop_path", "drop_path_rate"), "backbone.args.drop_path_rate"),
    **dict.fromkeys(("opt", "optim"), "optimizer"),
    **dict.fromkeys(("wd", "weight_decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("momentum",), "optimizer.momentum"),
    **dict.fromkeys(("loss", "loss_fn", "criterion"), "objective"),
    **dict.fromkeys(("smoothing", "label_smoothing"), "objective.label_smoothing"),
    **dict.fromkeys(("class_weight", "class_weights"), "objective.class_weights"),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "lr_schedule", "schedule"), "phases.each.curve"),
    **dict.fromkeys(("warmup_steps", "warmup_epochs", "warmup_ratio", "lr_warmup"), "phases.each.warmup"),
    **dict.fromkeys(("llrd", "layer_lr_decay", "layerwise_lr_decay"), "phases.each.layer_decay"),
    **dict.fromkeys(("freeze", "freezing", "unfreezing", "trainable"), "unfreeze"),
    **dict.fromkeys(("bn", "batchnorm", "freeze_bn", "norm_eval"), "phases.each.norm"),
    **dict.fromkeys(("sync_bn", "syncbn"), "loop.sync_batchnorm"),
    **dict.fromkeys(("amp", "fp16", "bf16", "dtype", "mixed_precision", "use_amp"), "loop.precision"),
    **dict.fromkeys(("grad_clip", "clip_grad", "clip_grad_norm", "max_grad_norm", "gradient_clip_val"), "loop.clip"),
    **dict.fromkeys(("ema_decay", "model_ema", "model_ema_decay"), "loop.ema"),
    **dict.fromkeys(("torch_compile", "torchcompile"), "loop.compile"),
    **dict.fromkeys(("grad_checkpointing", "activation_checkpointing"), "loop.gradient_checkpointing"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience", "early_stop"), "evaluate.patience"),
    **dict.fromkeys(("eval_every", "eval_interval", "eval_freq", "eval_steps", "val_interval"), "evaluate.every"),
    **dict.fromkeys(("monitor", "eval_metric", "metric_for_best_model"), "evaluate.metric"),
    **dict.fromkeys(("save_every", "save_interval", "save_freq", "save_steps", "checkpoint_every"), "checkpoint.every"),
    **dict.fromkeys(("save_total_limit", "checkpoint_hist", "keep_checkpoints"), "checkpoint.keep"),
    **dict.fromkeys(("log_every", "log_interval", "log_freq", "logging_steps", "print_freq"), "track.every"),
    **dict.fromkeys(("wandb", "tensorboard", "logger", "tracker", "report_to"), "track.trackers"),
    **dict.fromkeys(("out", "output", "out_dir", "output_dir", "save_dir", "work_dir", "log_dir", "exp_name"), "run"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "world_size", "nproc", "num_processes"), "world.size"),
    **dict.fromkeys(("max_time", "time_limit"), "stop_after"),
}
"""Another code's name -> the key here, with an example of its value where its form is another one."""


def right_key(word: str, *, group: str = "", keys: Mapping[str, str] = USUAL) -> str:
    """A clause such as ``; did you mean "data.batch"?``, or nothing.

    Args:
        word: the name that was typed, in any case, with dashes or underscores.
        group: of the part that the name was given to; its own arguments are no answer.
    """
    key = keys.get(word.lower().replace("-", "_"))
    if key is None or (group and key.partition(".")[0] == group):
        return ""
    return f'; did you mean "{key}"?'
