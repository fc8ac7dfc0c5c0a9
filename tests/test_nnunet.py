import io
import json
import pickle
import zipfile
from pathlib import Path

import nnunet_folder as made
import numpy as np
import pytest
import torch

from volseg.bundle import load_bundle, model_card, save_bundle, shipped_bundle
from volseg.errors import VolsegError
from volseg.nnunet import read_nnunet

PATCH = torch.randn(1, 1, *made.PATCH, generator=torch.Generator().manual_seed(5))
CASCADE = {"3d_fullres": made.configuration(previous_stage="3d_lowres")}
FLAT = {"3d_fullres": made.configuration(patch_size=[16, 16], spacing=[1.0, 1.0])}


def logits(network, patch=PATCH):
    with torch.inference_mode():
        return network.eval()(patch)


def with_configuration(**changes):
    return made.plans({"3d_fullres": made.configuration(**changes)})


def with_network(kind="PlainConvUNet", **changes):
    return with_configuration(architecture=made.architecture(kind, **changes))


def preprocess_of(tmp_path, **options):
    return read_nnunet(made.write_model(tmp_path, **options)).recipe.preprocess


# ---- weights


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_an_imported_network_gives_the_logits_of_the_checkpoint_also_after_saving(kind, tmp_path):
    state, plans = made.state_dict(kind), with_network(kind)
    folder = made.write_model(tmp_path, folds={"0": made.checkpoint(state)}, plans_json=plans)
    bundle = read_nnunet(folder)
    expected = made.logits_of(state, PATCH)
    imported = logits(bundle.segmentation_network())
    assert expected.std() > 0.1
    torch.testing.assert_close(imported, expected, rtol=1e-5, atol=1e-5)
    saved = save_bundle(bundle, tmp_path / "model")
    assert torch.equal(logits(load_bundle(tmp_path / "model").segmentation_network()), imported)
    for name in ("recipe", "reasons", "fingerprint", "origin"):
        assert getattr(saved, name) == getattr(bundle, name)
    suffixes = sorted(path.suffix for path in (tmp_path / "model").iterdir())
    assert suffixes == [".json", ".md", ".safetensors"]


def test_only_the_last_head_and_no_repetition_is_kept(tmp_path):
    state = made.state_dict()
    bundle = read_nnunet(made.write_model(tmp_path, folds={"0": made.checkpoint(state)}))
    kept = sum(tensor.numel() for tensor in bundle.weights["segmentation"].values())
    sizes = {
        key: tensor.numel()
        for key, tensor in state.items()
        if "all_modules" not in key and not key.startswith("decoder.encoder")
    }
    head = sizes["decoder.seg_layers.0.weight"] + sizes["decoder.seg_layers.0.bias"]
    assert kept == sum(sizes.values()) - head


def test_half_precision_weights_come_back_as_float32(tmp_path):
    state = {key: tensor.half() for key, tensor in made.state_dict().items()}
    bundle = read_nnunet(made.write_model(tmp_path, folds={"0": made.checkpoint(state)}))
    assert {tensor.dtype for tensor in bundle.weights["segmentation"].values()} == {torch.float32}


def test_folds_are_an_ensemble_in_the_order_of_their_numbers(tmp_path):
    states = {fold: made.state_dict(seed=int(fold)) for fold in ("10", "2", "0")}
    folds = {fold: made.checkpoint(state) for fold, state in states.items()}
    folds["all"] = made.checkpoint(made.state_dict(seed=77))
    folder = made.write_model(tmp_path, folds=folds)
    bundle = save_bundle(read_nnunet(folder), tmp_path / "model")
    assert list(bundle.weights) == ["segmentation", "segmentation_1", "segmentation_2"]
    networks = load_bundle(tmp_path / "model").segmentation_networks()
    for network, fold in zip(networks, ("0", "2", "10"), strict=True):
        torch.testing.assert_close(
            logits(network), made.logits_of(states[fold], PATCH), rtol=1e-5, atol=1e-5
        )
    mean = torch.stack([logits(network) for network in networks]).mean(0)
    expected = torch.stack([made.logits_of(state, PATCH) for state in states.values()]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(bundle.segmentation_network()), logits(networks[0]))


def test_folds_and_checkpoints_can_be_chosen(tmp_path):
    states = {fold: made.state_dict(seed=n) for n, fold in enumerate(("0", "1", "all"))}
    folds = {fold: made.checkpoint(state) for fold, state in states.items()}
    folder = made.write_model(tmp_path, folds=folds, checkpoint_name="checkpoint_best.pth")
    for name, fold in (("1", "1"), ("all", "all"), ("fold_0", "0")):
        bundle = read_nnunet(folder, folds=[name], checkpoint="checkpoint_best.pth")
        (network,) = bundle.segmentation_networks()
        expected = made.logits_of(states[fold], PATCH)
        torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)


def test_a_single_fold_all_is_taken_where_there_is_no_other(tmp_path):
    folder = made.write_model(tmp_path, folds={"all": made.checkpoint(made.state_dict())})
    assert len(read_nnunet(folder).segmentation_networks()) == 1


def test_a_bundle_without_an_ensemble_has_one_network():
    bundle = load_bundle(shipped_bundle())
    (network,) = bundle.segmentation_networks()
    patch = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(logits(network, patch), logits(bundle.segmentation_network(), patch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder.transpconvs.1.bias": None},
            r"1 of its tensors are missing \['decoder.transpconvs.1.bias'\]",
        ),
        (
            {"encoder.stages.0.0.convs.0.norm.running_mean": torch.zeros(3)},
            r"1 are unknown .*running",
        ),
        ({"decoder.seg_layers.1.bias": torch.zeros(9)}, "do not fit the network"),
    ],
)
def test_weights_of_another_network_than_that_of_the_plans_are_refused(change, message, tmp_path):
    state = made.state_dict() | change
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(VolsegError, match=message) as caught:
        read_nnunet(made.write_model(tmp_path, folds={"0": made.checkpoint(state)}))
    assert caught.value.code == "E_CKPT"


# ---- pickles


class Malicious:
    """An object whose pickle calls a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(protocol, tmp_path):
    folder = made.write_model(tmp_path)
    trap = tmp_path / "trap"
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = made.checkpoint(made.state_dict(), logging=Malicious(trap))
    torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(VolsegError, match=r"pickle asks for .*pathlib") as caught:
        read_nnunet(folder)
    assert caught.value.code == "E_PICKLE"
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Malicious(trap), protocol))  # without the archive
    with pytest.raises(VolsegError, match="pathlib"):
        read_nnunet(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("hidden", "names"),
    [
        (b"h\x00h\x01\x93", r"posix\.system"),  # from the memo, after other texts
        (b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93", "names that it puts together"),
    ],
)
def test_names_from_the_stack_are_refused_whatever_they_look_like(hidden, names, tmp_path):
    folder = made.write_model(tmp_path)
    texts = b"\x8c\x05posix\x94\x8c\x06system\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94"
    with zipfile.ZipFile(folder / "fold_0" / "checkpoint_final.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04" + texts + hidden + b"\x8c\x02id\x85R.")
    with pytest.raises(VolsegError, match=f"pickle asks for {names}") as caught:
        read_nnunet(folder)
    assert caught.value.code == "E_PICKLE"


def test_a_checkpoint_written_with_numpy_1_is_read(tmp_path):
    folder = made.write_model(tmp_path)
    path = folder / "fold_0" / "checkpoint_final.pth"
    renamed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/data.pkl"):
                assert b"cnumpy._core.multiarray" in data
                data = data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
            new.writestr(entry, data)
    expected = read_nnunet(folder).weights["segmentation"]
    path.write_bytes(renamed.getvalue())
    weights = read_nnunet(folder).weights["segmentation"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 cut off",
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"network_weights": 3}),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(content, tmp_path):
    folder = made.write_model(tmp_path)
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(content)
    with pytest.raises(VolsegError, match=r"checkpoint_final\.pth: not a checkpoint") as caught:
        read_nnunet(folder)
    assert caught.value.code == "E_CKPT"
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short_or_without_what_is_needed_is_refused(tmp_path):
    folder = made.write_model(tmp_path)
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(VolsegError, match="not a checkpoint"):
        read_nnunet(folder)
    torch.save({"state_dict": made.state_dict()}, path)
    message = r"not a checkpoint of nnU-Net v2 \(KeyError: 'init_args'\)"
    with pytest.raises(VolsegError, match=message):
        read_nnunet(folder)


# ---- files and folds


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_or_broken_json_is_named(name, tmp_path):
    folder = made.write_model(tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(VolsegError, match=rf"{name}: not JSON"):
        read_nnunet(folder)
    (folder / name).unlink()
    with pytest.raises(VolsegError, match=rf"no readable {name}") as caught:
        read_nnunet(folder)
    assert "\n" not in str(caught.value)


def test_the_folder_above_is_refused_with_the_right_one(tmp_path):
    folder = made.write_model(tmp_path)
    with pytest.raises(VolsegError, match="not a trained nnU-Net folder") as caught:
        read_nnunet(tmp_path)
    assert str(folder) in caught.value.fix


def test_missing_folds_and_checkpoints_are_named_with_what_there_is(tmp_path):
    folder = made.write_model(tmp_path)
    with pytest.raises(VolsegError, match="has no fold 3, 4; it has 0"):
        read_nnunet(folder, folds=["0", "3", "4"])
    with pytest.raises(VolsegError, match="name one twice"):
        read_nnunet(folder, folds=["0", "0"])
    (folder / "fold_1").mkdir()
    torch.save({}, folder / "fold_1" / "checkpoint_best.pth")
    message = "fold_1/checkpoint_final.pth: there is no such"
    with pytest.raises(VolsegError, match=message) as caught:
        read_nnunet(folder)
    assert "--checkpoint checkpoint_best.pth" in caught.value.fix
    empty = made.write_model(tmp_path / "other", folds={"0": {}})
    (empty / "fold_0").rename(empty / "old_0")
    with pytest.raises(VolsegError, match="has no fold_0"):
        read_nnunet(empty)


def test_the_configuration_is_that_of_the_folders_name(tmp_path):
    lowres = made.configuration(spacing=[3.0, 3.0, 3.0])
    both = {"3d_lowres": lowres, "3d_fullres": made.configuration()}
    low = made.checkpoint(made.state_dict(), init_args={"configuration": "3d_lowres"})
    name = "nnUNetTrainer_250epochs__myPlans__3d_lowres"
    folder = made.write_model(tmp_path, folds={"0": low}, plans_json=made.plans(both), name=name)
    assert read_nnunet(folder).recipe.spacing_mm == (3, 3, 3)
    renamed = folder.rename(tmp_path / "kidneys")
    assert read_nnunet(renamed).recipe.spacing_mm == (3, 3, 3)
    with pytest.raises(VolsegError, match="was trained as '3d_lowres'"):
        read_nnunet(renamed.rename(tmp_path / made.FOLDER))
    alone = made.write_model(tmp_path / "x", folds={"0": low}, name=name)
    with pytest.raises(VolsegError, match="has no configuration '3d_lowres'; it has 3d_fullres"):
        read_nnunet(alone)


# ---- plans → recipe


def test_a_default_ct_model_becomes_the_recipe_of_its_plans(tmp_path):
    bundle = read_nnunet(made.write_model(tmp_path))
    recipe = bundle.recipe
    assert recipe.name == "dataset007_test_3d_fullres"
    assert (recipe.spacing_mm, recipe.patch_shape, recipe.batch_size) == (
        (2.5, 0.8, 0.7),
        (8, 16, 16),
        2,
    )
    assert recipe.data.model_dump(exclude_unset=True) == {
        "channels": ("CT",),
        "labels": {"kidney": 1, "tumour": 2},
        "intensity_unit": "HU",
        "regions_class_order": None,
    }
    preprocess = recipe.preprocess
    expected = {
        "axes": "stored",
        "transpose": (0, 1, 2),
        "interpolation": "cubic",
        "separate_above": 3,
        "clip_overshoot": True,
        "crop": "nonzero",
        "normalise_first": True,
    }
    for name, value in expected.items():
        assert getattr(preprocess, name) == value, name
    assert (recipe.infer.overlap, recipe.infer.tta_axes) == (0.5, ("R", "A", "S"))
    assert bundle.fingerprint.n_cases == 12
    assert bundle.fingerprint.foreground["CT"].median == 45
    assert bundle.origin["nnU-Net trainer"] == "nnUNetTrainer"
    card = model_card(bundle)
    assert "2.5 × 0.8 × 0.7 mm (K, J, I)" in card
    assert "fold_0/checkpoint_final.pth: sha256 " in card


@pytest.mark.parametrize("axes", [None, (), (1, 2), (0, 1, 2)])
def test_tta_axes_are_those_of_the_checkpoint(axes, tmp_path):
    content = made.checkpoint(made.state_dict(), inference_allowed_mirroring_axes=axes)
    recipe = read_nnunet(made.write_model(tmp_path, folds={"0": content})).recipe
    assert recipe.infer.tta_axes == tuple("RAS"[axis] for axis in axes or ())


@pytest.mark.parametrize("forward", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
@pytest.mark.parametrize(
    "reader", ["SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"]
)
def test_axes_are_those_that_the_reader_and_the_transpose_give(reader, forward, tmp_path):
    plans = made.plans(image_reader_writer=reader, transpose_forward=forward)
    preprocess = preprocess_of(tmp_path, plans_json=plans)
    # R, A, S; for the readers that do not reorient, the file's I, J, K
    patient = np.arange(24).reshape(2, 3, 4)
    expected = patient.transpose(2, 1, 0).transpose(forward)
    prepared = patient if preprocess.axes == "canonical" else patient.transpose(2, 1, 0)
    assert preprocess.axes == ("canonical" if "Reorient" in reader else "stored")
    np.testing.assert_array_equal(prepared.transpose(preprocess.transpose), expected)


def test_every_normalisation_does_to_a_channel_what_nnunet_does(tmp_path):
    schemes = ["ZScoreNormalization", "ZScoreNormalization", "CTNormalization", "NoNormalization"]
    names = {"0": "T1", "1": "T2", "2": "CT", "3": "nonorm"}
    plans = with_configuration(
        normalization_schemes=schemes, use_mask_for_norm=[True, False, False, False]
    )
    folder = made.write_model(
        tmp_path,
        folds={"0": made.checkpoint(made.state_dict(channels=4))},
        plans_json=plans,
        dataset_json=made.dataset(channel_names=names),
    )
    bundle = read_nnunet(folder)
    assert bundle.recipe.data.intensity_unit == "a.u."
    array = np.random.default_rng(0).normal(200, 400, (6, 7, 8)).astype(np.float32)
    mask = np.zeros(array.shape, bool)
    mask[1:-1, 2:, :5] = True
    array[~mask] = 0
    inside = array[mask]
    expected = {
        "T1": np.where(mask, (array - inside.mean()) / inside.std(), 0),
        "T2": (array - array.mean()) / array.std(),
        "CT": (np.clip(array, -900, 300) - 40) / 160,
        "nonorm": array,
    }
    normalisers = map(bundle.recipe.preprocess.normaliser_of, bundle.recipe.data.channels)
    for normaliser, (name, values) in zip(normalisers, expected.items(), strict=True):
        np.testing.assert_allclose(
            normaliser(array, mask), values, rtol=1e-5, atol=1e-4, err_msg=name
        )


def test_rescaling_and_photographs_go_from_0_to_1(tmp_path):
    plans = with_configuration(
        normalization_schemes=["RescaleTo01Normalization", "RGBTo01Normalization"],
        use_mask_for_norm=[False, False],
    )
    folder = made.write_model(
        tmp_path,
        folds={"0": made.checkpoint(made.state_dict(channels=2))},
        plans_json=plans,
        dataset_json=made.dataset(channel_names={"0": "MR", "1": "MR"}),
    )
    bundle = read_nnunet(folder)
    channels = bundle.recipe.data.channels
    assert channels == ("MR_0000", "MR_0001")
    rescale, photograph = map(bundle.recipe.preprocess.normaliser_of, channels)
    array = np.random.default_rng(0).integers(3, 240, (4, 5, 6))
    body = array > 100
    expected = (array - array.min()) / np.ptp(array)
    np.testing.assert_allclose(rescale(array, body), expected, atol=1e-6)
    np.testing.assert_allclose(photograph(array, body), array / 255, atol=1e-6)


def test_regions_are_written_in_their_order_and_have_a_channel_each(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    dataset = made.dataset(labels=labels, regions_class_order=[1, 2, 3])
    folds = {"0": made.checkpoint(made.state_dict(heads=3))}
    bundle = read_nnunet(made.write_model(tmp_path, folds=folds, dataset_json=dataset))
    assert bundle.recipe.data.labels == {"whole": 1, "core": 2, "enhancing": 3}
    assert bundle.recipe.data.regions_class_order == (1, 2, 3)
    assert logits(bundle.segmentation_network()).shape[1] == bundle.recipe.data.n_outputs == 3


def test_the_ignore_label_has_no_channel(tmp_path):
    labels = {"background": 0, "a": 1, "b": [2], "ignore": 3}
    bundle = read_nnunet(made.write_model(tmp_path, dataset_json=made.dataset(labels=labels)))
    assert bundle.recipe.data.labels == {"a": 1, "b": 2}
    assert bundle.recipe.data.n_outputs == 3


@pytest.mark.parametrize(
    ("images", "logits", "expected"),
    [
        (
            {"order": 3, "force_separate_z": None},
            {"order": 1, "force_separate_z": None},
            ("cubic", 3.0, True),
        ),
        (
            {"order": 1, "force_separate_z": False},
            {"order": 1, "force_separate_z": False},
            ("linear", None, False),
        ),
        (
            {"order": 3, "force_separate_z": True},
            {"order": 1, "force_separate_z": True},
            ("cubic", 0.0, True),
        ),
        (
            {"order": 3, "force_separate_z": None, "separate_z_anisotropy_threshold": 2},
            {"order": 1, "force_separate_z": None, "separate_z_anisotropy_threshold": 2},
            ("cubic", 2.0, True),
        ),
        ({}, {"order": 1}, ("cubic", None, True)),
    ],
)
def test_the_rule_of_anisotropy_is_that_of_the_plans(images, logits, expected, tmp_path):
    plans = with_configuration(
        resampling_fn_data_kwargs=images, resampling_fn_probabilities_kwargs=logits
    )
    preprocess = preprocess_of(tmp_path, plans_json=plans)
    assert preprocess.interpolation == expected[0]
    assert (preprocess.separate_above, preprocess.clip_overshoot) == expected[1:]


def test_resampling_by_torch_is_linear(tmp_path):
    kwargs = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}
    plans = with_configuration(
        resampling_fn_data="resample_torch_fornnunet",
        resampling_fn_data_kwargs=kwargs,
        resampling_fn_probabilities="resample_torch_fornnunet",
        resampling_fn_probabilities_kwargs=kwargs,
    )
    preprocess = preprocess_of(tmp_path, plans_json=plans)
    assert preprocess.interpolation == "linear"
    assert (preprocess.separate_above, preprocess.clip_overshoot) == (3.0, False)


def test_a_configuration_inherits_what_it_does_not_state(tmp_path):
    child = {"inherits_from": "3d_fullres", "patch_size": [16, 16, 16]}
    plans = made.plans({"3d_fullres": made.configuration(), "3d_fullres_cube": child})
    init_args = {"configuration": "3d_fullres_cube"}
    folds = {"0": made.checkpoint(made.state_dict(), init_args=init_args)}
    folder = made.write_model(tmp_path, folds=folds, plans_json=plans, name="a__b__3d_fullres_cube")
    recipe = read_nnunet(folder).recipe
    assert (recipe.patch_shape, recipe.spacing_mm) == ((16, 16, 16), (2.5, 0.8, 0.7))


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_plans_in_the_old_form_give_the_same_network(kind, tmp_path, monkeypatch):
    # The old form can only double the features per level, up to a maximum.
    monkeypatch.setattr(made, "FEATURES", [3, 6, 7])
    n_down = made.RESIDUAL["n_blocks_per_stage"]
    if kind == "PlainConvUNet":
        n_down = made.PLAIN["n_conv_per_stage"]
    old = {
        "UNet_class_name": kind,
        "UNet_base_num_features": 3,
        "unet_max_num_features": 7,
        "n_conv_per_stage_encoder": n_down,
        "n_conv_per_stage_decoder": [1, 2],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": made.STRIDES,
        "conv_kernel_sizes": made.KERNELS,
    }
    state = made.state_dict(kind)
    plans = made.plans({"3d_fullres": made.configuration(architecture=None) | old})
    intensities = plans.pop("foreground_intensity_properties_per_channel")
    plans["foreground_intensity_properties_by_modality"] = intensities
    dataset = made.dataset(channel_names=None, modality={"0": "CT"})
    folds = {"0": made.checkpoint(state)}
    folder = made.write_model(tmp_path, folds=folds, plans_json=plans, dataset_json=dataset)
    imported = logits(read_nnunet(folder).segmentation_network())
    torch.testing.assert_close(imported, made.logits_of(state, PATCH), rtol=1e-5, atol=1e-5)


def test_the_dice_that_nnunet_measured_goes_to_the_card(tmp_path):
    folder = made.write_model(tmp_path)
    summary = folder / "fold_0" / "validation" / "summary.json"
    summary.parent.mkdir()
    summary.write_text(json.dumps({"foreground_mean": {"Dice": 0.8125}}))
    bundle = read_nnunet(folder)
    assert bundle.metrics == {"nnunet_validation_dice_fold_0": 0.8125}
    assert "nnunet_validation_dice_fold_0: 0.8125" in model_card(bundle)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (made.plans(CASCADE), "second stage of a cascade"),
        (made.plans(FLAT), "is 2D"),
        (with_configuration(architecture=made.architecture("PrimusM")),
         "architecture 'PrimusM' is unknown; volseg supports Pl"),
        (with_network(conv_op="torch.nn.modules.conv.Conv2d"), "not 3D"),
        (with_network(norm_op="torch.nn.modules.batchnorm.BatchNorm3d"),
         "volseg supports InstanceNorm3d"),
        (with_network(nonlin="torch.nn.GELU"), "volseg supports LeakyReLU and ReLU"),
        (with_network(nonlin_first=True), "nonlin_first"),
        (with_network("ResidualEncoderUNet", block="x.BottleneckD", bottleneck_channels=8),
         "BottleneckD"),
        (with_network(strides=None), "not described as nnU-Net does"),
        (with_network(n_conv_per_stage=[2, 2]), "2 stages down"),
        (with_configuration(normalization_schemes=["MyNorm"]),
         "normalisation 'MyNorm' is unknown; volseg supports CT"),
        (with_configuration(normalization_schemes=["CTNormalization"] * 2),
         "normalises 2 channels, but dataset.json names 1"),
        (with_configuration(preprocessor_name="MyPreprocessor"),
         "preprocessor 'MyPreprocessor' is unknown"),
        (with_configuration(resampling_fn_data="no_resampling_hack"),
         "'no_resampling_hack' is unknown"),
        (with_configuration(resampling_fn_data_kwargs={"order": 2}), "order 2"),
        (with_configuration(resampling_fn_data_kwargs={"order_z": 1}), "'order_z': 1"),
        (with_configuration(resampling_fn_data_kwargs={"force_separate_z": False}),
         "different rules of anisotropy"),
        (with_configuration(spacing=None), "spacing: field required"),
        (made.plans(image_reader_writer="NaturalImage2DIO"),
         "reader 'NaturalImage2DIO' is unknown"),
        (made.plans(label_manager="MyLabels"), "label manager 'MyLabels' is unknown"),
        (made.plans(transpose_forward=[0, 1, 1]), "transpose must hold 0, 1 and 2"),
        (made.plans(foreground_intensity_properties_per_channel={}), "has no intensity statistics"),
        (made.plans({"3d_fullres": {"inherits_from": "3d_fullres"}}), "missing or itself"),
        (made.plans({"3d_fullres": {"UNet_class_name": "PlainConvUNet", "patch_size": [8] * 3}}),
         "written before nnU-Net v2.4, but lacks"),
    ],
)  # fmt: skip
def test_unsupported_plans_are_refused_in_one_line_that_names_the_cause(plans, message, tmp_path):
    with pytest.raises(VolsegError) as caught:
        read_nnunet(made.write_model(tmp_path, plans_json=plans))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; to fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (made.dataset(labels={"background": 0}), "names no label"),
        (made.dataset(labels={"background": 0, "a": 1, "b": 3}), "are not numbered 1, 2, … 2"),
        (made.dataset(labels={"background": 0, "a": [1, 2], "b": 2}), "regions_class_order None"),
        (
            made.dataset(labels={"0": "background", "1": "a"}),
            "models of version 1 have to be trained again",
        ),
        (made.dataset(channel_names=None), "names no channels"),
    ],
)
def test_a_dataset_that_does_not_define_the_channels_is_refused(dataset, message, tmp_path):
    with pytest.raises(VolsegError) as caught:
        read_nnunet(made.write_model(tmp_path, dataset_json=dataset))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
