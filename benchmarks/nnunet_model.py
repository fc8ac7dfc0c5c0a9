"""Make an nnU-Net v2 model folder with nnU-Net's own classes, as if it had been trained.

    PEER/bin/python benchmarks/nnunet_model.py --out FOLDER [options]

PEER is an environment with nnunetv2. Writes plans.json, dataset.json and
fold_*/checkpoint_final.pth to FOLDER/Dataset<NNN>_<name>/<Trainer>__<Plans>__3d_fullres and prints
the path of that model folder on the last line. The weights are nnU-Net's He initialisation with a
centred head, so that every class wins somewhere; --train-steps trains them briefly on synthetic
balls instead.

--probe FILE.npz also saves `input` and nnU-Net's `logits` of a random patch for each fold, without
deep supervision, as in its predictor.
"""

import os
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter


def main():
    args = arguments()
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        os.environ[name] = tempfile.mkdtemp()
    os.environ["nnUNet_results"] = os.path.abspath(args.out)  # noqa: SIM112
    import numpy as np
    import torch
    from batchgenerators.utilities.file_and_folder_operations import save_json
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset, plans = dataset_of(args), plans_of(args)
    probe, folder = {}, None
    for fold in args.folds:
        fold = fold if fold == "all" else int(fold)
        trainer = nnUNetTrainer(
            {**plans, "continue_training": False}, "3d_fullres", fold, dataset, torch.device("cpu")
        )
        trainer.plans_manager.plans.pop("continue_training", None)
        manager = trainer.configuration_manager
        trainer.num_input_channels = len(args.channels)
        heads = trainer.label_manager.num_segmentation_heads
        trainer.network = trainer.build_network_architecture(
            trainer.plans_manager,
            manager,
            trainer.num_input_channels,
            heads,
            trainer.enable_deep_supervision,
        )
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if args.no_tta:
            trainer.inference_allowed_mirroring_axes = None
        # Nonzero biases and scales everywhere, so that an import which drops one of them fails.
        generator = torch.Generator().manual_seed(args.seed + (99 if fold == "all" else fold))
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                if parameter.ndim == 1 and not args.train_steps:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        shape = tuple(args.train_patch or args.patch)
        trainer.network.decoder.deep_supervision = False
        if args.train_steps:
            train(trainer.network, args, heads, shape, generator, torch)
        elif not args.no_balance:
            balance(trainer.network, heads, len(args.channels), shape, generator, torch)
        # A real run leaves NumPy scalars, floats and lists in the log.
        for key, value in {
            "mean_fg_dice": np.float64(0.5), "dice_per_class_or_region": [np.float64(0.5)],
            "train_losses": np.float32(-0.5), "val_losses": np.float32(-0.5), "lrs": 1e-2,
            "epoch_start_timestamps": time.time(), "epoch_end_timestamps": time.time(),
        }.items():  # fmt: skip
            trainer.logger.log(key, value, 0)
        trainer._best_ema = np.float64(0.5)
        folder = trainer.output_folder_base
        # One optimiser step, so that the checkpoint has momenta like a real one.
        if not args.small_checkpoint:
            for parameter in trainer.network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            state = trainer.network.state_dict()
            weights = {name: tensor.clone() for name, tensor in state.items()}
            trainer.optimizer.step()
            trainer.network.load_state_dict(weights)
        trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
        if args.probe:
            trainer.network.eval()
            size = tuple(args.probe_patch or args.patch)
            patch = torch.randn((1, len(args.channels), *size), generator=generator)
            with torch.inference_mode():
                probe[f"input_{fold}"] = patch.numpy()
                probe[f"logits_{fold}"] = trainer.network(patch).numpy()
    save_json(plans, os.path.join(folder, "plans.json"), sort_keys=False)
    save_json(dataset, os.path.join(folder, "dataset.json"), sort_keys=False)
    if args.probe:
        np.savez(args.probe, **probe)
    print(folder)


def train(network, args, heads, shape, generator, torch):
    """Train some steps of cross-entropy on noisy balls, to get smooth and confident logits.

    Class k is brighter than class k − 1, by more than the noise. At most 24 classes occur, as a
    scan shows only some of the organs that a model can label.
    """
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))
    present = torch.linspace(0, heads - 1, min(heads, 25)).long()  # the background is the first
    level = torch.linspace(-1.5, 2.0, len(present))
    noise = min(0.15, 3.5 / len(present) / 4)
    for step in range(args.train_steps):
        truth = torch.zeros(shape, dtype=torch.long)
        for ball in torch.randperm(len(present) - 1, generator=generator).repeat(1 + 6 // heads):
            centre = torch.rand(3, generator=generator) * torch.tensor(shape)
            radius = (0.08 + 0.17 * torch.rand(1, generator=generator)) * min(shape)
            truth[((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2] = ball + 1
        # Air around the body, whose intensity is far from all others.
        semi_axes = (0.35 + 0.6 * torch.rand(3, generator=generator)) * torch.tensor(shape)
        centre = (0.3 + 0.4 * torch.rand(3, generator=generator)) * torch.tensor(shape)
        offsets = (grid - centre[:, None, None, None]) / semi_axes[:, None, None, None]
        air = (offsets**2).sum(0) > 1
        truth[air] = 0
        image = level[truth] + noise * torch.randn(shape, generator=generator)
        image[air] = -5.5  # air after the normalisation in the plans below
        image = image[None, None].repeat(1, len(args.channels), 1, 1, 1)
        loss = torch.nn.functional.cross_entropy(network(image), present[truth][None])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    network.eval()


def balance(network, heads, channels, shape, generator, torch):
    """Scale the head's outputs to mean 0 and standard deviation 1, so that every class wins."""
    network.eval()
    size = tuple(min(64, p) for p in shape)
    with torch.no_grad():
        logits = network(torch.randn((1, channels, *size), generator=generator))[0]
        head = network.decoder.seg_layers[-1]
        sd = logits.flatten(1).std(1)
        head.weight /= sd[:, None, None, None, None]
        head.bias -= logits.flatten(1).mean(1)
        head.bias /= sd
    network.train()


def dataset_of(args):
    labels = {"background": 0} | {f"class_{n}": n for n in range(1, args.classes)}
    if args.regions:
        n = args.classes - 1
        labels = {"background": 0} | {f"region_{k}": list(range(k, n + 1)) for k in range(1, n + 1)}
    dataset = {
        "channel_names": {str(n): name for n, name in enumerate(args.channels)},
        "labels": labels, "numTraining": 100, "file_ending": ".nii.gz",
    }  # fmt: skip
    if args.regions:
        dataset["regions_class_order"] = list(range(1, args.classes))
    if args.ignore:
        dataset["labels"]["ignore"] = args.classes
    return dataset


def plans_of(args):
    """Return plans like those of nnU-Net's default planner, with the values of the arguments."""
    n = len(args.features)
    kernels = args.kernels or [[3, 3, 3]] * n
    strides = args.strides or [[1, 1, 1]] + [[2, 2, 2]] * (n - 1)
    plain = args.architecture == "plain"
    shared = {
        "n_stages": n, "features_per_stage": args.features,
        "conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": kernels, "strides": strides,
    }  # fmt: skip
    stages = "n_conv_per_stage" if plain else "n_blocks_per_stage"
    default = [2] * n if plain else ([1, 3, 4] + [6] * n)[:n]
    decoder = args.decoder_convs or [2 if plain else 1] * (n - 1)
    blocks = {stages: args.convs or default, "n_conv_per_stage_decoder": decoder}
    tail = {
        "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    names = {True: "CTNormalization", False: "ZScoreNormalization"}
    schemes = args.schemes or [names[channel.casefold() == "ct"] for channel in args.channels]
    masked = [args.mask_for_norm and scheme == "ZScoreNormalization" for scheme in schemes]
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2, "patch_size": args.patch,
        "median_image_size_in_voxels": [float(2 * p) for p in args.patch],
        "spacing": args.spacing, "normalization_schemes": schemes, "use_mask_for_norm": masked,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            + ("PlainConvUNet" if plain else "ResidualEncoderUNet"),
            "arch_kwargs": shared | blocks | tail,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }  # fmt: skip
    forward = args.transpose
    statistics = {"max": 3071.0, "mean": 40.0, "median": 50.0, "min": -1024.0}
    statistics |= {"percentile_00_5": -950.0, "percentile_99_5": 350.0, "std": 180.0}
    return {
        "dataset_name": args.name, "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": args.spacing,
        "original_median_shape_after_transp": [2 * p for p in args.patch],
        "image_reader_writer": args.reader, "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner" if plain else "nnUNetPlannerResEncM",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel":
            {str(n): statistics for n in range(len(args.channels))},
    }  # fmt: skip


def arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    integers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    words = lambda text: text.split(",")  # noqa: E731
    triples = lambda text: [integers(p.replace("x", ",")) for p in text.split(";")]  # noqa: E731
    add = parser.add_argument
    add("--out", required=True, help="folder used as nnUNet_results")
    add("--name", default="Dataset900_Made")
    add("--architecture", choices=("plain", "residual"), default="plain")
    add("--classes", type=int, default=2, help="including the background")
    add("--regions", action="store_true", help="classes − 1 nested regions, one sigmoid each")
    add("--ignore", action="store_true", help="add an ignore label")
    add("--channels", type=words, default=["CT"])
    add("--patch", type=integers, default=[128, 128, 128], help="in the order of the network axes")
    add("--spacing", type=lambda text: [float(p) for p in text.split(",")], default=[1.5, 1.5, 1.5])
    add("--features", type=integers, default=[32, 64, 128, 256, 320, 320])
    add("--strides", type=triples, help="such as 1x1x1;1x2x2;2x2x2")
    add("--kernels", type=triples, help="such as 1x3x3;3x3x3;3x3x3")
    add("--convs", type=integers, help="convolutions (plain) or blocks (residual) per stage")
    add("--decoder-convs", type=integers)
    add("--schemes", type=words, help="normalisation class names, one per channel")
    add("--mask-for-norm", action="store_true", help="use_mask_for_norm for the z-scored channels")
    add("--transpose", type=integers, default=[0, 1, 2], help="transpose_forward")
    add("--reader", default="NibabelIO", help="NibabelIO, SimpleITKIO, NibabelIOWithReorient, …")
    add("--folds", type=words, default=["0"], help="such as 0,1,2 or all")
    add("--no-tta", action="store_true")
    add("--no-balance", action="store_true", help="do not rescale the random head")
    add("--train-steps", type=int, default=0, help="train this many steps on synthetic balls")
    add("--train-patch", type=integers, help="patch for --train-steps (default: that of --patch)")
    add("--small-checkpoint", action="store_true", help="without the optimiser's momenta")
    add("--probe", help="save an input patch and nnU-Net's logits to this .npz file")
    add("--probe-patch", type=integers)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
