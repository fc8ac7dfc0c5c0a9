import pytest
import torch

import volseg


@pytest.mark.gpu
def test_training_and_inference_run_on_a_gpu_and_find_the_lesions(dataset, tiny_recipe, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    volseg.train(dataset, recipe=tiny_recipe, out=tmp_path / "model", device="cuda")
    volseg.infer(dataset / "images", model=tmp_path / "model", out=tmp_path / "out", device="cuda")
    report = volseg.evaluate(
        reference=dataset, predicted=tmp_path / "out", out=tmp_path / "evaluation"
    )
    assert report.summary["mean_dice"] > 0.7
