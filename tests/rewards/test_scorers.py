"""The open_clip scorers on the published architecture, with random weights in the published files.

Needs the extra `rewards`."""
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from g2rpo.errors import InputError
from g2rpo.rewards.checkpoints import convert_asset
from g2rpo.rewards.preference import ClipScorer, load_clip_score, load_exactly, load_hps21
from g2rpo.rewards.preprocess import clip_normalise, letterbox, to_pil
from g2rpo.rewards.protocol import to_uint8
from g2rpo.rewards.shapes import clip_shapes, open_clip_config
from torch.nn.functional import interpolate, normalize

MISSING = 'open_clip does not import here; pip install "g2rpo[rewards]"'
open_clip = pytest.importorskip('open_clip', reason=MISSING, exc_type=ImportError)

PROMPTS = ['a sign that says "1"', 'a cat', 'two dogs in the rain', 'red']
HPS_FILE = 'HPS_v2.1_compressed.pt'     # as it is published

def pictures(*size):
    "Four smooth random images (4, 3, *size)."
    noise = torch.rand(4, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    return interpolate(noise, size, mode='bicubic').clamp(0, 1)

def assert_scores(scorer):
    "Scores are cosines of unit vectors, the same for one image as for all; returns them."
    images = pictures(96, 128)
    image, text = scorer.features(images, PROMPTS)
    for features in (image, text):
        assert features.isfinite().all()
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    together = scorer(images, PROMPTS)
    singles = torch.cat([scorer(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, (image*text).sum(-1).cpu(), rtol=0, atol=1e-5)
    return together

def hps_of(model, tmp_path):
    "The scorer of a model's weights, by way of the published file."
    torch.save(dict(state_dict=model.state_dict()), tmp_path/HPS_FILE)
    return load_hps21(convert_asset('hps21', tmp_path/HPS_FILE, tmp_path/'hps'))

@pytest.mark.slow
def test_hps_on_the_full_architecture(tmp_path):
    "986 M random weights through the published file: key for key, same scores as the model they came from."
    torch.manual_seed(0)
    model = open_clip.create_model('ViT-H-14', pretrained=None, load_weights=False).eval()
    scores = assert_scores(hps_of(model, tmp_path))
    direct = ClipScorer(model, open_clip.get_tokenizer('ViT-H-14'), letterbox)
    torch.testing.assert_close(direct(pictures(96, 128), PROMPTS), scores)

SMALL_CLIP = dict(
    embed_dim=32, quick_gelu=True, vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
SQUASH = dict(mean=[.48, .45, .4], std=[.26, .26, .27], interpolation='bicubic', resize_mode='squash')

@pytest.fixture
def small_clip(tmp_path):
    "A CLIP folder as the hub has it, open_clip_config.json and a pickle, and the model that is in it."
    from open_clip.model import CLIP
    folder = tmp_path/'published'
    folder.mkdir()
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=SMALL_CLIP, preprocess_cfg=SQUASH)))
    torch.manual_seed(0)
    model = CLIP(**SMALL_CLIP).eval()
    torch.save(model.state_dict(), folder/'open_clip_pytorch_model.bin')
    return folder, model

def test_clip_score_takes_its_preprocessing_from_the_folder(small_clip, tmp_path):
    folder, model = small_clip
    scorer = load_clip_score('clip_dfn', convert_asset('clip_dfn', folder, tmp_path/'clip'))
    assert_scores(scorer)
    x = scorer.preprocess(pictures(96, 128))
    assert x.shape == (4, 3, 32, 32)
    _, theirs = open_clip.create_model_from_pretrained(f'local-dir:{tmp_path/"clip"}')
    torch.testing.assert_close(x, torch.stack([theirs(p) for p in to_pil(pictures(96, 128))]))
    with torch.no_grad():
        wanted = normalize(model.encode_image(x), dim=-1)
    torch.testing.assert_close(wanted, scorer.features(pictures(96, 128), PROMPTS)[0], rtol=0, atol=1e-5)

def test_shapes_are_open_clips(small_clip):
    folder, model = small_clip
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert clip_shapes(open_clip_config(folder)) == wanted

def test_other_weights_do_not_fit(small_clip):
    folder, model = small_clip
    with pytest.raises(InputError, match='do not fit'):
        load_exactly(model, dict(list(model.state_dict().items())[1:]), 'clip')
    assert not list(folder.glob('*.safetensors'))

@pytest.mark.parametrize('size', [(512, 512), (64, 64), (512, 384), (300, 1000)])
def test_letterbox_is_torchvisions(size):
    "HPSv2 resizes the tensor with torchvision's bicubic filter, then pads."
    from torchvision.transforms import InterpolationMode, functional as tv
    x, scale = to_uint8(pictures(*size)).float()/255, 224/max(size)
    new = [round(side*scale) for side in size]
    resized = tv.resize(x, new, InterpolationMode.BICUBIC) if scale != 1 else x
    h, w = 224 - new[0], 224 - new[1]
    wanted = clip_normalise(tv.pad(resized, [w//2, h//2, w - w//2, h - h//2]))
    torch.testing.assert_close(letterbox(pictures(*size)), wanted, rtol=0, atol=1e-5)

@pytest.fixture
def hps_package(tmp_path):
    """A copy of the hpsv2 package's own open_clip, with the vocabulary that its wheel lacks.

    Install it with `pip install --no-deps hpsv2==1.2.0` in an environment of its own."""
    spec = importlib.util.find_spec('hpsv2')
    if spec is None:
        pytest.skip('hpsv2 is not installed; its pins (pytest 7, protobuf 3) exclude it beside current packages')
    copy = tmp_path/'hps_theirs'
    shutil.copytree(Path(spec.submodule_search_locations[0])/'src'/'open_clip', copy)
    shutil.copy(Path(open_clip.__file__).parent/'bpe_simple_vocab_16e6.txt.gz', copy)
    sys.path.insert(0, str(tmp_path))
    try:
        yield importlib.import_module('hps_theirs')
    finally:
        sys.path.remove(str(tmp_path))

OPTIONS = dict(       # of the package's img_score
    precision='fp32', device='cpu', jit=False, force_quick_gelu=False, force_custom_text=False,
    force_patch_dropout=False, force_image_size=None, pretrained_image=False, image_mean=None, image_std=None,
    light_augmentation=True, aug_cfg={}, output_dict=True, with_score_predictor=False, with_region_predictor=False)

@pytest.mark.slow
def test_hps_equals_the_hpsv2_package(hps_package, tmp_path):
    "The package's model, tokenizer and preprocessing, as its img_score uses them, on the same 986 M random weights."
    torch.manual_seed(0)
    theirs, _, prepare = hps_package.create_model_and_transforms('ViT-H-14', None, **OPTIONS)
    ours = hps_of(theirs, tmp_path)
    images, prompts = pictures(96, 128)[:2], PROMPTS[:2]
    tokens = hps_package.get_tokenizer('ViT-H-14')(prompts)
    with torch.no_grad():
        out = theirs.eval()(torch.stack([prepare(p) for p in to_pil(images)]), tokens)
        wanted = (out['image_features'] @ out['text_features'].T).diagonal()
    torch.testing.assert_close(ours(images, prompts), wanted, rtol=0, atol=1e-4)
