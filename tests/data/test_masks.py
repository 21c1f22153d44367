"""Masks beside images weigh the loss and are never images to train on."""

import numpy as np
import pytest
import torch
from image_folders import refusals, write_image, write_metadata
from PIL import Image

from dopsd.data.captioning import uncaptioned
from dopsd.data.examples import Example
from dopsd.data.folder import read_folder
from dopsd.data.masks import mask_weights


def write_mask(path, white: tuple[int, int, int, int], size=(64, 64)):
    """A black mask with a white box (left, upper, right, lower)."""
    mask = Image.new("L", size)
    mask.paste(255, white)
    mask.save(path)
    return path


@pytest.mark.parametrize(
    "name",
    ["a-masklabel", "a_masklabel", "a_mask", "a-mask", "a.mask", "mask_a", "A_Mask", "mask-a"],
)
def test_a_mask_by_its_name_is_the_mask_of_its_image(name, tmp_path):
    write_image(tmp_path / "a.jpg", size=(64, 64))
    write_image(tmp_path / "b.png", size=(64, 64))
    mask = write_mask(tmp_path / f"{name}.png", (0, 0, 32, 64))
    listing = read_folder(tmp_path, "a cat")
    assert [(e.path.name, e.mask) for e in listing.examples] == [("a.jpg", mask), ("b.png", None)]
    ignoring = read_folder(tmp_path, "a cat", masks="ignore")
    assert [(e.path.name, e.mask) for e in ignoring.examples] == [("a.jpg", None), ("b.png", None)]
    assert uncaptioned(tmp_path)[0] == [tmp_path / "a.jpg", tmp_path / "b.png"]


def test_masks_are_found_beside_a_metadata_file_and_named_in_it(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png", size=(64, 64))
    write_mask(tmp_path / "a_mask.png", (0, 0, 32, 64))
    (tmp_path / "masks").mkdir()
    write_mask(tmp_path / "masks" / "b.png", (0, 0, 32, 64))
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a"},
        {"file_name": "b.png", "text": "b", "mask": "masks/b.png"},
        {"file_name": "c.png", "text": "c"},
    )
    masks = [
        e.mask and e.mask.relative_to(tmp_path).as_posix() for e in read_folder(tmp_path).examples
    ]
    assert masks == ["a_mask.png", "masks/b.png", None]
    write_metadata(tmp_path, *({"file_name": n, "text": n} for n in ("a.png", "a_mask.png")))
    message = refusals(tmp_path)
    assert "a_mask.png is the mask of a.png" in message


def test_a_picture_of_a_mask_is_an_image_unless_other_images_have_masks(tmp_path):
    write_image(tmp_path / "venice_mask.png", size=(64, 64))
    write_image(tmp_path / "dog.png", size=(64, 64))
    assert len(read_folder(tmp_path, "a cat").examples) == 2
    write_mask(tmp_path / "dog_mask.png", (0, 0, 32, 64))
    assert "venice_mask.png is a mask, and the image" in refusals(tmp_path, instance_prompt="a cat")


@pytest.mark.parametrize("name", ["gone-masklabel.png", "a-condlabel.png"])
def test_files_that_other_trainers_do_not_train_on_are_refused(name, tmp_path):
    write_image(tmp_path / "a.png", size=(64, 64))
    write_image(tmp_path / name, size=(64, 64))
    assert name in refusals(tmp_path, instance_prompt="a cat")


def test_a_mask_of_another_shape_or_without_white_is_refused(tmp_path):
    write_image(tmp_path / "a.png", size=(96, 64))
    for size, white, reason in [
        ((64, 64), (0, 0, 64, 64), "has the same shape"),
        ((64, 96), (0, 0, 64, 64), "has the same shape"),
        ((96, 64), (0, 0, 0, 0), "is black everywhere"),
    ]:
        write_mask(tmp_path / "a_mask.png", white, size)
        with pytest.raises(ValueError, match=reason):
            read_folder(tmp_path, "a cat")
    write_mask(tmp_path / "a_mask.png", (0, 0, 64, 64), (48, 32))
    assert read_folder(tmp_path, "a cat").examples[0].mask


MODES = ["L", "1", "P", "RGB", "RGBA", "LA", "I;16", "alpha only"]


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_the_mean_of_each_latent_position_whatever_the_files_mode(mode, tmp_path):
    """White in the left 20 of 64 pixels: columns of 8 pixels are 1, 1, 1/2 and 0."""
    image, mask = write_image(tmp_path / "a.png", size=(64, 64)), tmp_path / "a_mask.png"
    grey = Image.open(write_mask(mask, (0, 0, 20, 64)))
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(mask)
    elif mode == "alpha only":
        black = Image.new("RGB", (64, 64), "white")
        black.putalpha(grey)
        black.save(mask)
    else:
        grey.convert(mode).save(mask)
    weights = mask_weights(Example(image, "a cat", mask=mask), (64, 64), 8)
    expected = torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0]).expand(1, 8, 8)
    torch.testing.assert_close(weights, expected, atol=0.01, rtol=0)


def test_a_mask_is_cropped_and_scaled_as_its_image_is(tmp_path):
    """Image and mask are the same picture: the weights are the image's own means."""
    picture = np.zeros((64, 128), np.uint8)
    picture[8:40, 50:80] = 255
    for name, size in (("a", (128, 64)), ("a_mask", (256, 128))):
        Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(
            tmp_path / f"{name}.png"
        )
    weights = mask_weights(
        Example(tmp_path / "a.png", "a cat", mask=tmp_path / "a_mask.png"), (64, 64), 8
    )
    crop = torch.tensor(picture[:, 32:96] / 255)  # the square in the middle
    assert torch.allclose(weights[0], crop.view(8, 8, 8, 8).mean((1, 3)).float(), atol=0.02)


def test_a_mask_outside_the_crop_is_refused(tmp_path):
    image = write_image(tmp_path / "a.png", size=(256, 64))
    mask = write_mask(tmp_path / "a_mask.png", (0, 0, 20, 64), (256, 64))
    with pytest.raises(ValueError, match="nothing white in the part that is trained on, 64 x 64"):
        mask_weights(Example(image, "a cat", mask=mask), (64, 64), 8)


def test_transparency_is_a_mask_on_request(tmp_path):
    image = Image.new("RGBA", (64, 64), (200, 10, 10, 0))
    image.paste((200, 10, 10, 255), (0, 0, 20, 64))
    image.save(tmp_path / "a.png")
    assert read_folder(tmp_path, "a cat").examples[0].mask is None
    (example,) = read_folder(tmp_path, "a cat", masks="alpha").examples
    expected = torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0]).expand(1, 8, 8)
    torch.testing.assert_close(mask_weights(example, (64, 64), 8), expected, atol=0.01, rtol=0)
    write_image(tmp_path / "b.jpg")
    (note,) = read_folder(tmp_path, "a cat", masks="alpha").notes
    assert "1 images have no transparency (first: b.jpg)" in note
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no image of .* is transparent anywhere"):
        read_folder(tmp_path, "a cat", masks="alpha")


def test_masks_are_part_of_the_datas_fingerprint(tmp_path):
    write_image(tmp_path / "a.png", size=(64, 64))
    prints = [read_folder(tmp_path, "a cat").fingerprint()]
    for width in (20, 40):
        write_mask(tmp_path / "a_mask.png", (0, 0, width, 64))
        prints.append(read_folder(tmp_path, "a cat").fingerprint())
    assert len(set(prints)) == 3


def test_rows_decide_what_a_file_is_whatever_its_name(tmp_path):
    """An image to edit may be called a mask, and a mask may lie elsewhere than its image."""
    for name in ("a.png", "a_mask.png", "img/b.png", "b-masklabel.png"):
        write_image(tmp_path / name, (200, 200, 200), (64, 64))
    write_metadata(
        tmp_path,
        {"target": "a.png", "references": ["a_mask.png"], "text": "fill it"},
        {"file_name": "img/b.png", "mask": "b-masklabel.png", "text": "b"},
    )
    edited, masked = read_folder(tmp_path).examples
    assert edited.mask is None and [path.name for path in edited.references] == ["a_mask.png"]
    assert masked.mask == tmp_path / "b-masklabel.png"
