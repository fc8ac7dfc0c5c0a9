import nnunet_folder as made
import pytest
import torch

import volseg
from volseg.bundle import load_bundle
from volseg.commands import check
from volseg.errors import VolsegError


def test_an_imported_model_is_a_model_that_says_where_it_comes_from(tmp_path):
    folds = {fold: made.checkpoint(made.state_dict(seed=int(fold))) for fold in ("0", "1")}
    folder = made.write_model(tmp_path, folds=folds)
    report = volseg.import_nnunet(folder, out=tmp_path / "model")
    assert report.exit_code == 0
    bundle = load_bundle(tmp_path / "model")
    assert report.sha256 == bundle.sha256
    assert check(tmp_path / "model") == []
    facts = report.model
    assert facts["channels"] == "CT (window)"
    assert facts["networks per patch"] == "16: 2 folds × 8 with test-time augmentation"
    assert facts["nnU-Net trainer"] == "nnUNetTrainer"
    assert len([name for name in facts if name.startswith("fold_")]) == 2


def test_the_model_does_not_depend_on_the_folder_any_more(tmp_path):
    folder = made.write_model(tmp_path)
    volseg.import_nnunet(folder, out=tmp_path / "model")
    patch = torch.randn(1, 1, *made.PATCH)
    before = load_bundle(tmp_path / "model").segmentation_network().eval()(patch)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert torch.equal(load_bundle(tmp_path / "model").segmentation_network().eval()(patch), before)


def test_a_finished_model_is_not_overwritten_and_a_refused_one_leaves_nothing(tmp_path):
    folder = made.write_model(tmp_path)
    volseg.import_nnunet(folder, out=tmp_path / "model")
    before = (tmp_path / "model" / "model.json").read_bytes()
    with pytest.raises(VolsegError, match="holds a finished model") as caught:
        volseg.import_nnunet(folder, out=tmp_path / "model")
    assert caught.value.code == "E_EXISTS"
    assert (tmp_path / "model" / "model.json").read_bytes() == before
    with pytest.raises(VolsegError, match="has no fold 5"):
        volseg.import_nnunet(folder, out=tmp_path / "other", folds=["5"])
    assert not (tmp_path / "other").exists()
