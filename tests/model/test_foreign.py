"""Other people's weights: official containers and folders of transformers, both spellings."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finedetr.errors import ModelError
from finedetr.model.classes import COCO_IDS, COCO_NAMES, OBJECTS365_NAMES
from finedetr.model.detector import Detector
from finedetr.model.foreign import read_foreign
from finedetr.model.transformers import has_twin, to_transformers, transformers_config, write_transformers
from finedetr.model.weights import load_weights, read_card, transfer_weights
from finedetr.model.zoo import ZOO, variant
from tests.model.oracle import assert_same_answers, official, pair, randomize

ENTRIES = {  # state-dict entries of the official code (spec 1.4 - 1.6)
    "dfine-n": 674,
    "dfine-s": 794,
    "dfine-m": 1053,
    "deim-dfine-n": 674,
    "deim-dfine-l": 1253,
    "deim-dfine-x": 1571,
    "rtdetrv2-r18": 538,
    "rtdetrv2-r34": 665,
    "rtdetrv2-r50-m": 768,
    "rtdetrv2-r50": 744,
    "rtdetrv2-r101": 999,
    "rtdetrv2-hgnet-l": 869,
    "rtdetrv2-hgnet-x": 1119,
    "rtdetrv2-hgnet-h": 1351,
    "deim-rtdetrv2-r18": 540,
    "deim-rtdetrv2-r34": 667,
    "deim-rtdetrv2-r50": 801,
    "deim-rtdetrv2-r101": 1107,
    "deimv2-atto": 493,
    "deimv2-femto": 493,
    "deimv2-pico": 551,
    "deimv2-n": 639,
    "deimv2-s": 673,
    "deimv2-m": 769,
    "deimv2-l": 809,
    "deimv2-x": 989,
    "deimv2-hgnet-s": 729,
    "deimv2-hgnet-m": 943,
    "deimv2-hgnet-l": 1137,
    "deimv2-hgnet-x": 1325,
}

OFFICIAL_ROWS = (  # which class of Objects365 each of COCO's starts from in the official code (spec 2.4)
    *(0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96),
    *(144, 295, 178, 180, 38, 39, 13, 43, 120, 219, 148, 173, 165, 154, 137, 113, 145, 146, 204, 8),
    *(35, 10, 88, 84, 93, 26, 112, 82, 265, 104, 141, 152, 234, 143, 150, 97, 2, 50, 25, 75),
    *(98, 153, 37, 73, 115, 132, 106, 61, 163, 134, 277, 81, 133, 18, 94, 30, 169, 70, 328, 226),
)


@pytest.mark.parametrize("name", ENTRIES)
def test_official_names_are_as_many_as_the_official_code_has(name: str) -> None:
    with torch.device("meta"):
        assert len(official(Detector(variant(name), 80))) == ENTRIES[name]


def test_official_names_are_those_of_the_official_code() -> None:
    with torch.device("meta"):
        dfine, rtdetr = official(Detector(variant("dfine-x"), 80)), official(Detector(variant("rtdetrv2-r50"), 80))
    assert {
        "backbone.stem.stem2a.bn.running_mean",
        "backbone.stages.1.downsample.conv.weight",
        "backbone.stages.2.blocks.1.layers.3.conv2.bn.weight",
        "backbone.stages.0.blocks.0.aggregation.1.conv.weight",
        "encoder.encoder.0.layers.0.self_attn.in_proj_bias",
        "encoder.fpn_blocks.0.cv2.0.bottlenecks.1.conv2.norm.weight",
        "encoder.downsample_convs.1.0.cv2.conv.weight",
        "decoder.up",
        "decoder.input_proj.2.norm.bias",
        "decoder.decoder.layers.5.cross_attn.sampling_offsets.bias",
        "decoder.decoder.layers.0.gateway.norm.weight",
        "decoder.decoder.lqe_layers.3.reg_conf.layers.1.weight",
        "decoder.enc_output.proj.weight",
        "decoder.pre_bbox_head.layers.2.bias",
        "decoder.dec_bbox_head.5.layers.0.weight",
        "decoder.denoising_class_embed.weight",
    } <= dfine.keys()
    with torch.device("meta"):
        tiny, vit, dinov3 = (official(Detector(variant(f"deimv2-{size}"), 80)) for size in ("atto", "s", "x"))
    assert {
        "encoder.down_sample2.1.weight",
        "encoder.bi_fusion.cv.norm.bias",
        "encoder.pan_block.cv3.0.bottlenecks.1.conv2.conv.weight",
        "decoder.decoder.layers.0.norm2.scale",
        "decoder.decoder.layers.2.swish_ffn.w12.bias",
        "decoder.dec_bbox_head.2.layers.0.weight",
    } <= tiny.keys()
    assert {
        "backbone.dinov3._model.blocks.11.mlp.fc2.weight",
        "backbone.dinov3._model.rope_embed.periods",
        "backbone.sta.conv4.2.running_var",
        "backbone.convs.2.weight",
        "backbone.norms.0.bias",
        "encoder.fpn_blocks.1.cv2.0.conv1.conv.weight",
        "decoder.decoder.layers.3.gateway.norm.scale",
        "decoder.query_pos_head.layers.2.weight",
    } <= vit.keys()
    assert {
        "backbone.dinov3.mask_token",
        "backbone.dinov3.norm.weight",
        "backbone.dinov3.blocks.0.attn.qkv.bias_mask",
        "backbone.dinov3.blocks.5.ls2.gamma",
        "backbone.dinov3.blocks.11.mlp.w3.bias",
    } <= dinov3.keys()
    assert not {key for key in (*tiny, *vit, *dinov3) if key.startswith(("encoder.input_proj.1", "decoder.enc_output"))}
    assert {
        "backbone.conv1.conv1_3.norm.weight",
        "backbone.res_layers.0.blocks.0.short.conv.weight",
        "backbone.res_layers.3.blocks.0.short.conv.norm.weight",
        "backbone.res_layers.2.blocks.5.branch2c.conv.weight",
        "encoder.pan_blocks.1.bottlenecks.2.conv1.norm.running_var",
        "decoder.decoder.layers.2.cross_attn.value_proj.weight",
        "decoder.decoder.layers.2.norm2.weight",
        "decoder.query_pos_head.layers.1.bias",
    } <= rtdetr.keys()


@pytest.mark.parametrize("container", ["ema", "model", "flat"])
def test_an_official_checkpoint_loads_from_every_container(tmp_path: Path, container: str) -> None:
    torch.manual_seed(0)
    detector = Detector(variant("dfine-n"), 80)
    randomize(detector)
    state = {f"module.{key}": value for key, value in official(detector).items()}
    wrong = {key: torch.zeros_like(value) for key, value in state.items()}
    document = {"ema": {"ema": {"module": state}, "model": wrong}, "model": {"model": state}, "flat": state}[container]
    torch.save(document, tmp_path / "dfine_n_coco.pth")
    loaded, card = load_weights(tmp_path / "dfine_n_coco.pth")
    assert card.config == variant("dfine-n")
    assert (card.names, card.category_ids) == (COCO_NAMES, COCO_IDS)
    for key, tensor in detector.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(loaded.state_dict()[key], tensor, atol=0, rtol=0)


def test_the_name_of_a_file_tells_deim_from_d_fine(tmp_path: Path) -> None:
    state = official(Detector(variant("dfine-n"), 3))
    for name, model in (("deim_hgnetv2_n.pth", "deim-dfine-n"), ("n.pth", "dfine-n")):
        torch.save({"model": state}, tmp_path / name)
        card = read_card(tmp_path / name)
        assert card.config == ZOO[model]
        assert card.names == ("class 0", "class 1", "class 2")


def test_what_bins_mean_is_read_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    row = variant("dfine-n")
    wide = Detector(replace(row, decoder=replace(row.decoder, scale=8.0, up=0.25)), 2).eval()
    randomize(wide)
    torch.save({"model": official(wide)}, tmp_path / "n.pth")
    loaded, card = load_weights(tmp_path / "n.pth")
    assert (card.config.decoder.scale, card.config.decoder.up) == (8.0, 0.25)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images).matching.boxes, wide(images).matching.boxes)


def test_no_name_of_a_folder_above_decides(tmp_path: Path) -> None:
    above = tmp_path / "my-deim-dsp-cache"
    (above / "hf").mkdir(parents=True)
    dfine, rtdetr = Detector(variant("dfine-n"), 2), Detector(variant("rtdetrv2-r18"), 2)
    for name, detector in (("n.pth", dfine), ("r18.pth", rtdetr)):
        torch.save(official(detector), above / name)
        assert read_card(above / name).config == detector.config
    write_transformers(above / "hf", dfine, ("hen", "egg"))
    assert read_card(above / "hf").config == variant("dfine-n")
    write_transformers(above / "deim-dsp", rtdetr, ("hen", "egg"))
    assert read_card(above / "deim-dsp").config == variant("rtdetrv2-r18")


def test_a_repository_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    for repository, model in (("models--they--DEIM_N", "deim-dfine-n"), ("models--they--dfine", "dfine-n")):
        folder = tmp_path / repository / "snapshots" / "5f3e"
        folder.mkdir(parents=True)
        state = {key: value.contiguous() for key, value in official(Detector(variant("dfine-n"), 2)).items()}
        save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"made_by": "them"}))
        assert read_card(folder).config == variant(model)


@pytest.mark.parametrize("name", ["dfine-n", "rtdetrv2-r18"])
def test_a_folder_of_transformers_answers_as_over_there(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    ours, theirs = pair(variant(name), 4)
    theirs.config.id2label = dict(enumerate(("hen", "egg", "fox", "cat")))
    theirs.save_pretrained(tmp_path)
    loaded, card = load_weights(tmp_path)
    assert card.names == ("hen", "egg", "fox", "cat")
    images = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, after = ours(images).matching, loaded(images).matching
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.boxes, after.boxes)


def test_the_first_rt_detr_is_the_same_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = variant("rtdetrv2-r18")
    settings = {key: value for key, value in transformers_config(config, ("a", "b")).items() if key != "model_type"}
    torch.manual_seed(0)
    theirs = transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "hf")
    ours, card = load_weights(tmp_path / "hf")
    assert (card.config, card.names) == (config, ("a", "b"))
    images = assert_same_answers(ours, theirs, (320, 320))

    first = {re.sub(r"(encoder\.input_proj\.\d)\.conv", r"\1.0", key): v for key, v in official(ours).items()}
    first = {re.sub(r"(^encoder\.input_proj\.\d)\.norm", r"\1.1", key): v for key, v in first.items()}
    torch.save({"ema": {"module": first}}, tmp_path / "rtdetr_r18vd.pth")
    again, _ = load_weights(tmp_path / "rtdetr_r18vd.pth")
    with torch.inference_mode():
        assert torch.equal(again(images).matching.boxes, ours(images).matching.boxes)


@pytest.mark.parametrize("name", ["dfine-s", "rtdetrv2-r18"])
def test_what_we_write_for_transformers_answers_the_same_there(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = Detector(variant(name), 3).eval()
    randomize(ours)
    write_transformers(tmp_path, ours, ("hen", "egg", "fox"), (320, 320))
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "hen", 1: "egg", 2: "fox"}
    images = assert_same_answers(ours, theirs, (320, 320))
    again, card = load_weights(tmp_path)
    assert card.names == ("hen", "egg", "fox")
    with torch.inference_mode():
        assert torch.equal(again(images).matching.boxes, ours(images).matching.boxes)


def test_the_model_that_answers_before_its_last_layer_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = Detector(variant("rtdetrv2-r50-m"), 2).eval()
    write_transformers(tmp_path, ours, ("hen", "egg"))
    again, card = load_weights(tmp_path)
    assert card.config.decoder.layers == 3  # the layers that only training uses are not written
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(again(images).matching.boxes, ours(images).matching.boxes)


def test_rt_detrs_own_names_of_its_hgnet_are_read(tmp_path: Path) -> None:
    name = "rtdetrv2-hgnet-l"
    torch.manual_seed(0)
    ours = Detector(variant(name), 3)
    renamed = {
        re.sub(
            r"aggregation\.1\.",
            "aggregation_excitation_conv.",
            re.sub(r"aggregation\.0\.", "aggregation_squeeze_conv.", key),
        ): value
        for key, value in official(ours).items()
    }
    theirs = {re.sub(r"(stem2[ab]\.conv)\.weight", r"\1.1.weight", key): value for key, value in renamed.items()}
    assert {
        "backbone.stem.stem2a.conv.1.weight",
        "backbone.stages.3.blocks.0.aggregation_squeeze_conv.bn.weight",
        "backbone.stages.0.blocks.0.aggregation_excitation_conv.conv.weight",
    } <= theirs.keys()
    torch.save({"ema": {"module": theirs}}, tmp_path / "rtdetrv2_hgnetv2_l_6x_coco_from_paddle.pth")
    loaded, card = load_weights(tmp_path / "rtdetrv2_hgnetv2_l_6x_coco_from_paddle.pth")
    assert card.config == variant(name)
    state = ours.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items() if "tracked" not in k)


def test_discrete_sampling_is_known_by_the_name_of_a_file_and_by_transformers_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = Detector(variant("rtdetrv2-r18-dsp"), 2)
    randomize(ours)
    torch.save({"ema": {"module": official(ours)}}, tmp_path / "rtdetrv2_r18vd_dsp_3x_coco.pth")
    assert read_card(tmp_path / "rtdetrv2_r18vd_dsp_3x_coco.pth").config == variant("rtdetrv2-r18-dsp")
    write_transformers(tmp_path / "hf", ours, ("hen", "egg"))
    again, card = load_weights(tmp_path / "hf")
    assert card.config == variant("rtdetrv2-r18-dsp")
    images = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        assert torch.equal(again(images).matching.boxes, ours.eval()(images).matching.boxes)
    fresh = Detector(variant("rtdetrv2-r18-dsp"), 2)  # as published: fine-tuned from the weights of its twin
    twin = Detector(variant("rtdetrv2-r18"), 2)
    torch.save(official(twin), tmp_path / "r18.pth")
    assert transfer_weights(fresh, ("class 0", "class 1"), tmp_path / "r18.pth").skipped == ()
    offsets = "decoder.layers.0.cross_attention.sampling_offsets.bias"
    assert torch.equal(fresh.state_dict()[offsets], twin.state_dict()[offsets])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder_activation_function", "silu"),
        ("encoder_activation_function", "relu"),
        ("activation_function", "relu"),
        ("decoder_attention_heads", 4),
        ("positional_encoding_temperature", 20),
        ("decoder_n_points", [4, 8]),
    ],
)
def test_a_configuration_that_no_tensor_shows_is_refused(
    tmp_path: Path, hf: dict[str, torch.Tensor], key: str, value: object
) -> None:
    save_file(hf, tmp_path / "model.safetensors")
    settings = transformers_config(variant("dfine-n"), ("a", "b"))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_card(tmp_path).config == variant("dfine-n")
    (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(ModelError, match=rf"{key} is .*; its config\.json says {re.escape(repr(value))}"):
        read_card(tmp_path)


@pytest.fixture(scope="module")
def hf() -> dict[str, torch.Tensor]:
    """The tensors of dfine-n as transformers has them."""
    state = to_transformers(Detector(variant("dfine-n"), 2).state_dict(), variant("dfine-n"))
    return {key: value.clone() for key, value in state.items() if key.startswith("model.")}


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("dfine-n", "decoder", {"sampling": "discrete"}),
        ("dfine-n", "decoder", {"gateway": False}),
        ("dfine-n", "decoder", {"refine": False}),
        ("dfine-n", "decoder", {"position_limit": None}),
        ("dfine-n", "backbone", {"name": "vit-tiny", "stages": (2, 3)}),
        ("rtdetrv2-r18", "decoder", {"points": (4, 4, 2)}),
        ("rtdetrv2-r18", "decoder", {"look_twice": False}),
        ("rtdetrv2-r18", "encoder", {"depth": 0.34}),
        ("rtdetrv2-r18", "backbone", {"name": "resnet50"}),
    ],
)
def test_what_transformers_configuration_cannot_say_is_not_written(
    name: str, part: str, change: dict[str, object]
) -> None:
    row = variant(name)
    assert has_twin(row)
    config = replace(row, **{part: replace(getattr(row, part), **change)})
    with pytest.raises(ModelError, match="no model like"):
        transformers_config(config, ("a",))


def test_heads_and_bins_are_told_to_transformers() -> None:
    row = variant("dfine-n")
    config = replace(row, decoder=replace(row.decoder, heads=4, up=0.25), encoder=replace(row.encoder, heads=2))
    settings = transformers_config(config, ("a",))
    assert (settings["decoder_attention_heads"], settings["encoder_attention_heads"], settings["up"]) == (4, 2, 0.25)


def test_every_row_is_written_that_was_published_for_transformers() -> None:
    written = {name for name, config in ZOO.items() if has_twin(config)}
    assert written == {*(f"dfine-{size}" for size in "nsmlx")} | {
        f"rtdetrv2-{size}{sampling}" for size in ("r18", "r34", "r50-m", "r50", "r101") for sampling in ("", "-dsp")
    } - {"rtdetrv2-r101-dsp"}


def test_transformers_has_no_deim(tmp_path: Path) -> None:
    with torch.device("meta"):
        detector = Detector(variant("deim-dfine-n"), 3)
    with pytest.raises(ModelError, match="no model like 'deim-dfine-n'"):
        write_transformers(tmp_path, detector, ("a", "b", "c"))


def test_fine_tuning_starts_from_an_official_checkpoint_by_class_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Detector(variant("dfine-n"), 80)
    torch.save({"model": official(source)}, tmp_path / "dfine_n_coco.pth")
    target = Detector(variant("dfine-n"), 2)
    transfer = transfer_weights(target, ("dog", "unicorn"), tmp_path / "dfine_n_coco.pth")
    assert (transfer.kept, transfer.new, transfer.skipped) == (("dog",), ("unicorn",), ())
    row = COCO_NAMES.index("dog")
    assert torch.equal(target.selection.score_head.weight[0], source.selection.score_head.weight[row])
    assert target.selection.score_head.bias[1].item() == pytest.approx(-4.595, abs=1e-3)


def test_objects365_weights_start_a_coco_detector_row_by_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Detector(variant("dfine-n"), 366)
    torch.save({"model": official(source)}, tmp_path / "dfine_n_obj365.pth")
    card = read_card(tmp_path / "dfine_n_obj365.pth")
    assert card.names == ("unused", *OBJECTS365_NAMES)
    assert card.category_ids == tuple(range(366))
    target = Detector(variant("dfine-n"), 80)
    transfer = transfer_weights(target, COCO_NAMES, tmp_path / "dfine_n_obj365.pth")
    assert (transfer.kept, transfer.new, transfer.skipped) == (COCO_NAMES, (), ())
    assert len(transfer.dropped) == 366 - 80
    rows = [row + 1 for row in OFFICIAL_ROWS]
    for key in ("selection.score_head.weight", "decoder.score_heads.1.bias"):
        assert torch.equal(target.state_dict()[key], source.state_dict()[key][rows])
    table = {text: what for what, text in transfer.rows()}
    assert table["bird <- Wild Bird"] == "kept"
    assert len(transfer.rows()) == 80 + 1


def test_tensors_that_are_none_are_named_and_no_traceback(tmp_path: Path) -> None:
    state = official(Detector(variant("dfine-n"), 2))
    changes = {
        "decoder.enc_score_head.weight": (torch.tensor(1.0), "fits no model"),
        "decoder.decoder.layers.0.self_attn.in_proj_weight": (torch.tensor(1.0), r"in_proj_weight is \(\)"),
        "decoder.decoder.layers.0.self_attn.in_proj_bias": (torch.zeros(5), r"in_proj_bias is \(2,\), expected"),
        "decoder.reg_scale": (torch.zeros(1).to_sparse(), "reg_scale is sparse"),
        "decoder.up": (torch.zeros(1), "wanted numbers above 0, got 4.0 and 0.0"),
    }
    for key, (tensor, message) in changes.items():
        torch.save({"model": {**state, key: tensor}}, tmp_path / "dfine_n.pth")
        with pytest.raises(ModelError, match=message):
            read_foreign(tmp_path / "dfine_n.pth")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = official(Detector(variant("dfine-n"), 80))
    lacking = {key: value for key, value in state.items() if "gateway.gate" not in key}
    torch.save({"model": lacking}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"the closest, dfine-n, lacks 6 tensors: .*gateway\.gate"):
        read_foreign(tmp_path / "a.pth")
    torch.save({"model": {**state, "decoder.extra": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(ModelError, match=r"looks like dfine-n, but holds 1 tensors more: decoder\.extra"):
        read_foreign(tmp_path / "b.pth")
    torch.save({"model": Path("x")}, tmp_path / "c.pth")  # an object: loading it would run code
    with pytest.raises(ModelError, match="no checkpoint that holds numbers only"):
        read_foreign(tmp_path / "c.pth")
    (tmp_path / "e.pth").write_bytes(b"")
    with pytest.raises(ModelError, match="no checkpoint that holds numbers only"):
        read_foreign(tmp_path / "e.pth")
    (tmp_path / "f.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"f\.pth is cut off or damaged"):
        read_foreign(tmp_path / "f.pth")
    disks = struct.pack("<4sLqL", b"PK\x06\x07", 1, 0, 2)  # damaged there: an archive that spans two disks
    (tmp_path / "g.pth").write_bytes(b"PK\x03\x04" + bytes(100) + disks + b"PK\x05\x06" + bytes(18))
    with pytest.raises(ModelError, match=r"g\.pth is cut off or damaged"):
        read_foreign(tmp_path / "g.pth")
    torch.save({"model": 3}, tmp_path / "d.pth")
    with pytest.raises(ModelError, match="holds no table of tensors"):
        read_foreign(tmp_path / "d.pth")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="no model of type 'yolos' is read"):
        read_foreign(tmp_path / "hf")
