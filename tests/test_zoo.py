"""The zoo's pipelines as files that diffusers loads without us, prompts that nobody should write, and bad calls."""
import subprocess
import sys
import warnings

import pytest
import torch

from segquant_nb import zoo
from segquant_nb.scenes import caption, edges, render, sample_scene, vocabulary
from segquant_nb.zoo import (FAMILIES, WEIGHTS, controlnet_for, generate, load, noise_model, read_weights, unknown_words,
                             with_controlnet)

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


def test_words_of_a_negative_prompt_are_warned_of_too():
    for given in ('a zebra', ['a', 'a zebra']):
        with pytest.warns(UserWarning, match="never learned 'unicorn', 'zebra':"):
            generate(load('tiny-sdxl'), ['a ring', 'a unicorn'], negative_prompt=given, num_inference_steps=1)


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
    for given, said in ((None, 'FluxControlNetPipeline needs edges'), (LINES, r'edges have shape \(2, .* \(3, 3, 64, 64\)'),
                        (LINES[:1], r'edges have shape \(1, '), (torch.cat([LINES]*2)[:3, :1], r'of shape \(B, 3, H, W\)'),
                        (torch.cat([LINES]*2)[:3]*2 - 1, 'from 0 to 1')):
        with pytest.raises(ValueError, match=said):
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


# ---- each picture on its own ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('controlnet', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_picture_does_not_depend_on_its_company(name, controlnet):
    pipe, words = load(name, controlnet), ['a red ring', 'a cross']
    def drawn(rows, **more):
        return generate(pipe, words[rows], seed=7 + rows.start, num_inference_steps=3, edges=LINES[rows] if controlnet else None, **more)
    together = drawn(slice(0, 2))
    assert torch.equal(drawn(slice(0, 2), batch=2), together)
    for i in range(2):
        assert (drawn(slice(i, i + 1))[0] - together[i]).abs().max() < 1e-4
    assert (drawn(slice(0, 2), batch=1) - together).abs().max() < 1e-4


def test_lists_have_one_entry_for_each_prompt_whatever_the_batch():
    pipe, words, not_wanted = load('tiny-sdxl'), ['a red ring', 'a cross', 'a square'], ['a', 'a red cross', 'A LARGE ring']
    start = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    options = dict(num_inference_steps=2, negative_prompt=not_wanted, latents=start)
    together = generate(pipe, words, **options)
    assert (generate(pipe, words, batch=2, **options) - together).abs().max() < 1e-4
    assert (generate(pipe, words, **options | dict(negative_prompt='a')) - together)[1:].abs().max() > 1e-3
    small = options | dict(negative_prompt=[w.lower() for w in not_wanted])
    assert torch.equal(generate(pipe, words, **small), together)
    dice = [torch.Generator().manual_seed(s) for s in (7, 8, 9)]
    assert (generate(pipe, words, batch=2, num_inference_steps=2, generator=dice)
            - generate(pipe, words, seed=7, num_inference_steps=2)).abs().max() < 1e-4


@pytest.mark.parametrize('option, said', [
    (dict(output_type='pil'), "output_type='pil': generate gives tensors"), (dict(num_images_per_prompt=2), 'one picture for a prompt'),
    (dict(negative_prompt=['a']), 'negative_prompt has 1 entries: expected one for each of 2'), (dict(batch=0), 'batch=0'),
    (dict(latents=torch.zeros(3, 16, 16, 16)), 'latents has 3 entries'), (dict(num_inference_steps=0), 'num_inference_steps=0'),
    (dict(return_dict=False), 'return_dict: generate makes that itself'), (dict(control_image=LINES, prompt='a'), 'control_image, prompt: ')])
def test_options_that_cannot_be_are_refused(option, said):
    with pytest.raises(ValueError, match=said):
        generate(load('tiny-sdxl'), ['a ring', 'a cross'], **option)


# ---- long prompts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', FAMILIES)
def test_a_long_prompt_is_cut_with_one_sentence_and_nothing_from_diffusers(name, caplog):
    import logging
    import diffusers
    import transformers
    pipe, long = load(name), 'a large red ring, plain dark background ' + ' '.join(['red', 'blue']*20)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_warning()
        library.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            cut = generate(pipe, [long, 'a cross'], num_inference_steps=2, negative_prompt=long)
    finally:
        for library in (diffusers, transformers):
            library.logging.set_verbosity_error()
            library.logging.disable_propagation()
    assert not [r for r in caplog.records if 'truncated' in r.getMessage() or 'longer' in r.getMessage()]
    said = [str(w.message) for w in said if 'leaves out' in str(w.message)]
    read, lost = zoo._readable(pipe, [long])
    assert len(said) == 1 and f'{" ".join(lost[:5])!r} and {2*len(lost) - 5} words more' in said[0]
    assert f'{read[0]} {" ".join(lost)}' == long
    assert max(len(t(read[0]).input_ids) for t in (pipe.tokenizer, pipe.tokenizer_2)) == 24
    assert torch.equal(cut, generate(pipe, [*read, 'a cross'], num_inference_steps=2, negative_prompt=read[0]))


def test_a_word_without_end_is_left_out_as_a_whole():
    assert zoo._readable(load('tiny-sd35'), ['x'*50, 'a ring ' + 'x'*50, 'a  RING']) == (['', 'a ring', 'a  ring'], ['x'*50]*2)


# ---- weights --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['vae', 'tiny-flux'])
def test_one_bit_is_enough_to_be_refused(name, tmp_path):
    for file in ('weights.json', f'{name}.safetensors'):
        (tmp_path/file).write_bytes((WEIGHTS/file).read_bytes())
    assert read_weights(name, tmp_path).keys() == read_weights(name).keys()
    path = tmp_path/f'{name}.safetensors'
    content = bytearray(path.read_bytes())
    for place in (len(content)//2, len(content) - 1, 0):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}.safetensors is damaged'):
            read_weights(name, tmp_path)
        content[place] ^= 1


def test_a_folder_without_weights_is_named(tmp_path):
    for call in (lambda: read_weights('vae', tmp_path), lambda: load('tiny-flux', folder=tmp_path)):
        with pytest.raises(FileNotFoundError, match=f'{tmp_path.name} holds no weights of the zoo'):
            call()


def test_a_damaged_listing_is_named(tmp_path):
    whole = (WEIGHTS/'weights.json').read_bytes()
    for content in (b'', whole[:300], b'\xff' + whole):
        (tmp_path/'weights.json').write_bytes(content)
        with pytest.raises(ValueError, match='weights.json is damaged'):
            load('tiny-flux', folder=tmp_path)


@pytest.mark.parametrize('dtype', ['bf16', torch.int8, None])
def test_a_dtype_that_no_model_has_is_refused(dtype):
    with pytest.raises(ValueError, match='expected a floating-point type'):
        load('tiny-flux', dtype=dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_other_dtypes_are_loaded_without_a_word(dtype, caplog):
    import diffusers
    diffusers.logging.set_verbosity_warning()
    diffusers.logging.enable_propagation()
    try:
        pipe = load('tiny-sd35', controlnet=True, dtype=dtype)
    finally:
        diffusers.logging.set_verbosity_error()
        diffusers.logging.disable_propagation()
    assert not caplog.records
    for part in ('transformer', 'vae', 'text_encoder', 'text_encoder_2', 'text_encoder_3', 'controlnet'):
        assert {p.dtype for p in getattr(pipe, part).parameters()} == {dtype}


# ---- ControlNets ----------------------------------------------------------------------------------------------------
def test_edges_reach_the_autoencoder_in_its_own_range():
    "SD3's and FLUX's: from −1 to 1, where raw lines would be from 0 to 1"
    for name in ('tiny-sd35', 'tiny-flux'):
        twin, seen = load(name, controlnet=True), []
        hook = twin.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        generate(twin, ['a ring', 'a cross'], edges=LINES, num_inference_steps=1)
        hook.remove()
        assert torch.equal(seen[0][-2:], LINES*2 - 1)


def test_a_twin_draws_with_a_copy_and_leaves_no_trace():
    twin = load('tiny-sd35', controlnet=True)
    before = dict(vars(twin)), dict(vars(twin.vae))
    generate(twin, ['a ring', 'a cross'], edges=LINES, num_inference_steps=1)
    assert dict(vars(twin.vae)) == before[1] and twin.vae is before[0]['vae'] and twin.config == before[0]['_internal_dict']


@pytest.mark.parametrize('shape', [(2, 3, 32, 32), (2, 3, 64, 128), (2, 1, 64, 64), (2, 64, 64)])
def test_edges_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match='as large as the pictures|of shape .B, 3, H, W.'):
        generate(load('tiny-sd35', controlnet=True), ['a ring', 'a cross'], edges=torch.zeros(shape))
    wide = generate(load('tiny-sd35', controlnet=True), ['a ring'], edges=torch.zeros(1, 3, 64, 96), width=96, num_inference_steps=1)
    assert wide.shape == (1, 3, 64, 96)


def test_a_controlnet_of_another_family_is_refused():
    nets = {name: controlnet_for(load(name)) for name in FAMILIES}
    for name in FAMILIES:
        with_controlnet(load(name), nets[name])
        for other in FAMILIES:
            if other != name:
                with pytest.raises(ValueError, match=f'ControlNetPipeline takes an instance of .*; given: {type(nets[other]).__name__}'):
                    with_controlnet(load(name), nets[other])
    twin = load('tiny-flux', controlnet=True)
    for call in (lambda: with_controlnet(twin, nets['tiny-flux']), lambda: controlnet_for(twin)):
        with pytest.raises(ValueError, match='one of StableDiffusion3Pipeline, .*; given: FluxControlNetPipeline'):
            call()
