"""The images: networks, files, the split, what is measured, and a fit under STEP that is exported and loaded back."""

import math
import pickle

import numpy as np
import pytest
import torch

from examples import cifar
from tests.examples.fitting import check_fit, validate
from tests.examples.tiny_files import write_cifar


@pytest.fixture
def folder(tmp_path):
    write_cifar(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("network", "dataset", "parameters"),
    [("resnet18", "cifar10", 11_173_962), ("densenet121", "cifar10", 6_956_298), ("densenet121", "cifar100", 7_048_548)],
)
def test_base_is_the_published_network(network, dataset, parameters):
    with torch.device("meta"):
        model = cifar.ImageClassifier(network, "base", dataset)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("network", "convolutions"), [("resnet18", 20), ("densenet121", 120)])
def test_base_has_as_many_layers_as_its_name_says(network, convolutions):
    # 18 and 121 count the last linear layer, and 18 leaves out the three convolutions beside the residual ones.
    with torch.device("meta"):
        model = cifar.ImageClassifier(network, "base", "cifar10")
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == convolutions


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("network", ["resnet18", "densenet121", "vit"])
def test_logits_have_one_column_per_class(network, size):
    for dataset, shape, classes in (("cifar100", (2, 3, 32, 32), 100), ("digits", (2, 1, 8, 8), 10)):
        with torch.device("meta"):
            assert cifar.ImageClassifier(network, size, dataset).model(torch.zeros(shape)).shape == (2, classes)


def test_the_archive_is_read_plane_by_plane_and_row_by_row(folder):
    x, y, x_test, y_test = cifar.load_cifar(folder, "cifar10")
    assert (x.shape, x.dtype, x_test.shape) == ((40, 3, 32, 32), torch.uint8, (8, 3, 32, 32))
    third = pickle.loads((folder / "cifar-10-batches-py" / "data_batch_3").read_bytes())
    assert int(x[16 + 5, 1, 2, 7]) == third[b"data"][5, 1024 + 2 * 32 + 7]
    assert y[16:24].tolist() == third[b"labels"]
    assert len(y) == 40
    assert len(y_test) == 8


def test_cifar100_is_read_with_its_fine_labels(folder):
    x, y, x_test, y_test = cifar.load_cifar(folder, "cifar100")
    assert len(x) == len(y) == len(x_test) == len(y_test) == 8
    assert int(y.max()) > 9


def test_a_numpy_file_says_the_same_as_the_archive(folder, tmp_path):
    x, y, x_test, y_test = cifar.load_cifar(folder, "cifar10")
    images = {"x_train": x.permute(0, 2, 3, 1).numpy(), "x_test": x_test.permute(0, 2, 3, 1).numpy()}
    single = tmp_path / "single"
    single.mkdir()
    np.savez(single / "cifar10.npz", y_train=y.numpy()[:, None], y_test=y_test.numpy(), **images)
    for ours, theirs in zip(cifar.load_cifar(single, "cifar10"), (x, y, x_test, y_test), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dataset", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(dataset, archive, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"Expected the file .*Fetch .*/{archive}.tar.gz and unpack it in {tmp_path}"
    ):
        cifar.ImageData(dataset, str(tmp_path)).setup("fit")


def labels_of(part):
    return [int(label) for _, label in part]


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_the_split_is_the_seeds_and_nothing_is_in_two_parts(dataset, folder):
    if dataset == "digits":
        pytest.importorskip("sklearn")

    def split(seed):
        data = cifar.ImageData(dataset, str(folder), held_out=0.25, seed=seed)
        data.setup("fit")
        return data.parts

    first, again, other = split(0), split(0), split(1)
    assert first["train"].indices == again["train"].indices != other["train"].indices
    assert labels_of(first["test"]) == labels_of(again["test"])
    train, val = set(first["train"].indices), set(first["val"].indices)
    assert not train & val
    total = {"cifar10": 40, "digits": 1797 - 359}[dataset]
    assert (len(train | val), len(val)) == (total, total // 4)


def test_fewer_images_are_the_first_of_all_and_the_same_are_held_out(folder):
    whole, part = (cifar.ImageData("cifar10", str(folder), train=train) for train in (None, 10))
    whole.setup("fit")
    part.setup("fit")
    assert part.parts["train"].indices == whole.parts["train"].indices[:10]
    assert part.parts["val"].indices == whole.parts["val"].indices


@pytest.mark.parametrize(("channels", "side", "mirrors"), [(3, 32, True), (1, 8, False)])
def test_jitter_moves_and_mirrors_whole_images(channels, side, mirrors):
    image = torch.arange(1.0, channels * side * side + 1).view(1, channels, side, side)
    pad = side // 8
    padded = torch.nn.functional.pad(image, (pad,) * 4)[0]
    places = range(2 * pad + 1)
    moved = [padded[:, y : y + side, x : x + side] for y in places for x in places]
    known = {m.numpy().tobytes() for m in moved}
    flipped = {m.flip(2).numpy().tobytes() for m in moved}
    made = [i.numpy().tobytes() for i in cifar.jitter(image.expand(200, -1, -1, -1))]
    assert set(made) <= (known | flipped if mirrors else known)
    assert len(set(made)) > 0.8 * min(len(moved), 100)
    if mirrors:
        assert 60 < sum(m in flipped for m in made) < 140


def test_accuracy_and_loss_are_those_of_a_network_that_always_says_three(folder):
    model = cifar.ImageClassifier("vit", "tiny", "cifar10")
    torch.nn.init.zeros_(model.model.head.weight)
    model.model.head.bias.data = torch.zeros(10).index_fill(0, torch.tensor([3]), 1.0)
    data = cifar.ImageData("cifar10", str(folder), batch_size=3, held_out=0.5)
    metrics = validate(model, data)
    labels = labels_of(data.parts["val"])
    share = labels.count(3) / len(labels)
    assert 0 < share < 1
    assert metrics["val_accuracy"] == pytest.approx(share)
    assert metrics["val_loss"] == pytest.approx(math.log(math.e + 9) - share, rel=1e-5)


@pytest.mark.parametrize("network", ["resnet18", "densenet121", "vit"])
def test_a_fit_under_step_is_exported_and_loaded_back(network, folder, tmp_path):
    def model():
        return cifar.ImageClassifier(network, "tiny", "cifar10", lr=1e-2)

    masked = check_fit(model, cifar.ImageData("cifar10", str(folder), batch_size=4), tmp_path)
    # The stem of a convolutional network has three input channels, which no group of four fits into.
    assert not any(name.startswith("0.") or "embedder" in name for name in masked)
    assert len(masked) == {"resnet18": 20, "densenet121": 20, "vit": 8}[network]


def test_the_digits_are_fitted_without_any_file(tmp_path):
    pytest.importorskip("sklearn")
    data = cifar.ImageData("digits", folder=str(tmp_path / "nowhere"), train=64, batch_size=16)
    check_fit(lambda: cifar.ImageClassifier("vit", "tiny", "digits", lr=1e-2), data, tmp_path)
