"""The zoo's pipelines as files that diffusers loads without us, prompts that nobody should write, and bad calls."""
import subprocess
import sys
import warnings

import pytest
import torch

from segquant_nb.scenes import caption, edges, render, sample_scene, vocabulary
from segquant_nb.zoo import FAMILIES, generate, load, noise_model, unknown_words

pytestmark = pytest.mark.filterwarnings('ignore:.FluxPosEmbed')
LINES = edges(render([sample_scene(s) for s in range(2)]))


@pytest.fixture(scope='module', autouse=True)
def quiet():
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()  # no word about torchvision or a prompt that is cut
        library.logging.disable_progress_bar()


# ---- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('controlnet', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_saved_pipeline_is_one_of_diffusers(name, controlnet, tmp_path):
    from diffusers import DiffusionPipeline
    pipe = load(name, controlnet)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob('*.json'):
        assert 'segquant' not in file.read_text(encoding='utf-8'), file
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe) and type(pipe).__module__.startswith('diffusers.')
    words = [caption(sample_scene(s)) for s in range(2)]
    call = dict(seed=3, num_inference_steps=2, edges=LINES if controlnet else None)
    assert torch.equal(generate(again, words, **call), generate(pipe, words, **call))
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in noise_model(half).parameters()} == {torch.bfloat16}


def test_a_saved_pipeline_draws_where_this_package_is_not(tmp_path):
    "FLUX has to be told its size"
    for name in FAMILIES:
        load(name).save_pretrained(tmp_path/name)
    code = '''
import sys
sys.modules['segquant_nb'] = None
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    size = dict(height=64, width=64) if 'flux' in folder else {}
    print(*pipe('a red ring', num_inference_steps=1, **size).images[0].size)'''
    done = subprocess.run([sys.executable, '-c', code, *(tmp_path/name for name in FAMILIES)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ['64 64']*3, done.stderr


# ---- prompts --------------------------------------------------------------------------------------------------------
SILLY = {'': [], ' \n\t': [], '🦄🦄': ['🦄'], 'A LARGE RED RING': [], 'ein roter Ring': ['ein', 'roter'],
         '红色的圆': ['红色的圆'], ' '.join(['red ring']*500): [], 'x'*5000: ['x'*5000], 'ring.' + '\0': ['.', '\0'],
         'a 3-legged ring': ['3', '-', 'legged'], ', , ,': [], '<|endoftext|> </s>': ['<', '|', 'endoftext', '>', '/', 's']}


@pytest.mark.parametrize('name', FAMILIES)
def test_every_prompt_gives_a_picture(name):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        images = generate(load(name), list(SILLY), num_inference_steps=2)
    assert images.shape == (len(SILLY), 3, 64, 64) and images.isfinite().all()
    said = [str(w.message) for w in said if 'never learned' in str(w.message)]
    assert len(said) == 1 and "'🦄', 'ein'" in said[0] and 'and 11 more' in said[0]
    assert said[0].count("'") == 10  # five by name


@pytest.mark.parametrize('prompt', SILLY)
def test_unknown_words_are_found(prompt):
    assert list(unknown_words(prompt)) == SILLY[prompt]


def test_the_nearest_known_word_is_offered():
    assert unknown_words(['a sqare', 'gren, Backgrund']) == {'sqare': 'square', 'gren': 'green', 'backgrund': 'background'}
    assert unknown_words('elephant') == {'elephant': None}
    assert unknown_words(' '.join(vocabulary())) == {}


def test_the_warning_points_at_the_caller_and_comes_once():
    pipe = load('tiny-flux')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('default')
        for _ in range(2):
            generate(pipe, ['a red sqare']*3, batch=1, num_inference_steps=1)
    said = [w for w in said if 'never learned' in str(w.message)]
    assert len(said) == 1 and said[0].filename == __file__ and "'sqare' (did you mean 'square'?)" in str(said[0].message)


def test_known_words_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.FluxPosEmbed')
        generate(load('tiny-flux'), ['', 'A LARGE RED RING'], num_inference_steps=1)


def test_capitals_are_small_letters_to_all_families():
    for name in FAMILIES:
        pipe, words = load(name), ['a large red ring, plain dark background']
        assert torch.equal(generate(pipe, [words[0].upper()], num_inference_steps=2),
                           generate(pipe, words, num_inference_steps=2))


# ---- calls ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('prompts', [[], 'a red ring', [3], [None], ('a red ring',), None])
def test_what_is_no_list_of_prompts_is_refused(prompts):
    with pytest.raises(ValueError, match='expected a list with at least one prompt'):
        generate(load('tiny-flux'), prompts)


def test_edges_have_to_fit():
    twin = load('tiny-flux', controlnet=True)
    for given in (None, LINES, LINES[:1], torch.cat([LINES]*2)[:3, :1]):
        with pytest.raises(ValueError, match=r'FluxControlNetPipeline needs edges of shape \(3, 3, height, width\)'):
            generate(twin, ['a red ring']*3, edges=given)
    with pytest.raises(ValueError, match='FluxPipeline takes no edges'):
        generate(load('tiny-flux'), ['a red ring']*2, edges=LINES)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_twin_is_deterministic_and_leaves_the_generator_alone(name):
    twin, call = load(name, controlnet=True), dict(edges=LINES, num_inference_steps=2, seed=7)
    torch.manual_seed(1)
    first = generate(twin, ['a red ring', 'a cross'], **call)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(generate(twin, ['a red ring', 'a cross'], **call), first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)


def test_other_pipelines_keep_their_own_defaults():
    "No size, no length and no warning of the zoo's for a pipeline that is not of the zoo"
    from graph_pipelines import sdxl_pipeline, sd3_pipeline
    for make in (sdxl_pipeline, sd3_pipeline):
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            images = generate(pipe, ['abc'], num_inference_steps=1)
        side = pipe.default_sample_size*pipe.vae_scale_factor
        assert images.shape == (1, 3, side, side)
        assert not [w for w in said if 'never learned' in str(w.message)]
