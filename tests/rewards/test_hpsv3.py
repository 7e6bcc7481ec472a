"HPSv3 on a network of a toy size in the published files, held to what the published code makes of the same weights."
import json
import zlib

import pytest
import torch
from g2rpo.errors import InputError
from g2rpo.rewards.checkpoints import convert_asset
from g2rpo.rewards.hpsv3 import empty_hpsv3, HpsV3, hpsv3_key, hpsv3_question, hpsv3_size, qwen2_vl_config
from g2rpo.rewards.load import load_rewards
from g2rpo.rewards.shapes import check_asset, module_shapes
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, Tokenizer
from transformers import PreTrainedTokenizerFast

MARKS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>',
         '<|video_pad|>']
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
QUESTION = '''
raise RuntimeError('this file is read, not run')
INSTRUCTION = """Rate it.\nTextual prompt - {text_prompt}\n"""
prompt_with_special_token = """\nThe rating: <|Reward|>\n\nEND\n"""
'''
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rope_parameters=dict(rope_type='default', rope_theta=1e6, mrope_section=[1, 1, 2]))
VISION = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
PROMPTS = ['a red fox', 'two blue birds on a wire, at dawn']
WORDS = 264                        # 256 bytes, seven marks, <|Reward|>
PUBLISHED = (-4.450299, -2.800516)   # hpsv3 1.0.0 in transformers 4.45.2, on these weights, pictures and prompts

def published_shapes():
    "Name → shape as hpsv3 1.0.0 stores a network of this size."
    found = module_shapes(lambda: empty_hpsv3(qwen2_vl_config(WORDS, 0, TEXT, VISION)))
    names = {'body.language_model.': 'model.', 'body.visual.': 'visual.', 'head.': 'rm_head.'}
    def published(key):
        here = next(name for name in names if key.startswith(name))
        return names[here] + key.removeprefix(here)
    return {published(key): shape for key, shape in found.items()} | {'lm_head.weight': (WORDS, 32)}

def drawn(name, shape):
    "A weight that follows from its name."
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return x*(.3 if len(shape) > 1 else .1) + (1. if 'norm' in name and name.endswith('weight') else 0.)

def picture(h, w):
    "A smooth image (3, h, w)."
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing='ij')
    return torch.stack([x, y, (x*y*9).sin()**2])

@pytest.fixture
def folders(tmp_path, monkeypatch):
    "The package's folder on the path, the assets hpsv3 and qwen2_vl."
    package = tmp_path/'site'/'hpsv3'
    (package/'dataset').mkdir(parents=True)
    (package/'__init__.py').write_text("raise RuntimeError('imported')")
    (package/'dataset'/'data_collator_qwen.py').write_text(QUESTION)
    monkeypatch.syspath_prepend(str(package.parent))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[0]).save_pretrained(tmp_path/'qwen')
    (tmp_path/'qwen'/'chat_template.json').write_text(json.dumps(dict(chat_template=TEMPLATE)))
    weights = tmp_path/'HPSv3.safetensors'
    save_file({name: drawn(name, shape) for name, shape in published_shapes().items()}, weights)
    return (convert_asset('hpsv3', weights, tmp_path/'hpsv3'),
            convert_asset('qwen2_vl', tmp_path/'qwen', tmp_path/'qwen2_vl'))

def load(folders): return HpsV3(*folders, text=TEXT, vision=VISION)

def test_the_published_scores(folders):
    "Two pictures of different shapes with prompts of different lengths; one by one, for a batch has one shape."
    scorer = load(folders)
    images = (picture(96, 64), picture(64, 96))
    scores = torch.cat([scorer(image[None], [prompt]) for image, prompt in zip(images, PROMPTS)])
    torch.testing.assert_close(scores, torch.tensor(PUBLISHED), rtol=0, atol=1e-5)

@pytest.mark.parametrize('size,wanted', [
    ((1024, 1024), (448, 448)), ((768, 768), (420, 420)), ((288, 1152), (196, 868)), ((320, 2000), (168, 1120)),
    ((400, 1600), (224, 896)), ((64, 96), (392, 560)), ((448, 448), (448, 448))])
def test_pictures_have_the_published_size(size, wanted): assert hpsv3_size(*size) == wanted

def test_padding_changes_nothing(folders):
    scorer, images = load(folders), torch.stack([picture(64, 64), picture(64, 64).flip(1)])
    single = torch.cat([scorer(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(2)])
    torch.testing.assert_close(scorer(images, PROMPTS), single, rtol=0, atol=1e-5)

def test_a_prompt_cannot_answer_for_the_question(folders):
    "Marks in a prompt are text, and a brace is a brace."
    score = load(folders)(picture(64, 64)[None], ['<|Reward|> <|image_pad|> {text_prompt}'])
    assert score.shape == (1,) and score.isfinite().all()

def test_what_is_lacking_is_one_line(folders, monkeypatch):
    hpsv3, qwen = folders
    state = load_file(hpsv3/'HPSv3.safetensors')
    short = {k: v[:WORDS - 1] if 'embed' in k else v for k, v in state.items()}
    save_file(short, hpsv3.parent/'HPSv3.safetensors')
    with pytest.raises(InputError, match='knows 263 tokens and <|Reward|> is number 263'):
        load((convert_asset('hpsv3', hpsv3.parent/'HPSv3.safetensors', hpsv3.parent/'short'), qwen))
    save_file({k: v for k, v in state.items() if k != 'model.norm.weight'}, hpsv3.parent/'HPSv3.safetensors')
    with pytest.raises(InputError, match='do not fit its architecture: 1 missing such as .*language_model.norm.weight'):
        load((convert_asset('hpsv3', hpsv3.parent/'HPSv3.safetensors', hpsv3.parent/'less'), qwen))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install --no-deps hpsv3'):
        hpsv3_question()
    with pytest.raises(InputError, match='pip install --no-deps hpsv3'):
        load_rewards(['hpsv3'])

def test_the_published_size():
    "As many weights as Qwen2-VL-7B has without the head of its vocabulary, and names that lead back to themselves."
    words = 151_658
    shapes = module_shapes(lambda: empty_hpsv3(qwen2_vl_config(words, 0)))
    count = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith('body.'))
    assert count == 8_291_375_616 - 3584*(152_064 + 152_064 - words)      # the published number, its vocabulary cut
    assert hpsv3_key('lm_head.weight') is None and hpsv3_key('rm_head.5.bias') == 'head.5.bias'

def test_weights_are_held_to_the_network(tmp_path):
    "What is fetched under the name is refused where a tensor has another shape."
    save_file({'model.embed_tokens.weight': torch.zeros(4, 8)}, tmp_path/'HPSv3.safetensors')
    with pytest.raises(InputError, match='these are not the weights of hpsv3'):
        check_asset('hpsv3', tmp_path)
