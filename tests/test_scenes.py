"""What scenes refuse, and edges beside their definition."""
import pytest
import torch

from segquant_nb.metrics import answers
from segquant_nb.scenes import Scene, Thing, check_pictures, edge_overlap, edges, render, sample_scene

IMAGES = render([sample_scene(s) for s in range(3)])
LINES = edges(IMAGES)


@pytest.mark.parametrize('wrong', [IMAGES*2 - 1, IMAGES*255, (IMAGES*255).byte(), IMAGES[0], IMAGES[:, :1], IMAGES[:0], IMAGES/0 - IMAGES/0,
                                   IMAGES.tolist(), None])
def test_edges_are_taken_of_pictures_only(wrong):
    with pytest.raises(ValueError, match=r'of shape \(B, 3, H, W\), from 0 to 1'):
        edges(wrong)


@pytest.mark.parametrize('wrong', [[], sample_scene(3), ['a red ring'], None])
def test_what_is_no_list_of_scenes_is_refused(wrong):
    for call in (render, answers):
        with pytest.raises(ValueError, match='expected a list with at least one Scene'):
            call(wrong)


def test_what_is_no_pair_of_edge_maps_is_refused():
    for pair in ((LINES, LINES[:1]), (LINES, LINES[..., :32])):
        with pytest.raises(ValueError, match='cannot compare'):
            edge_overlap(*pair)
    for pair in ((IMAGES, LINES), (LINES, IMAGES), (LINES/2, LINES)):
        with pytest.raises(ValueError, match='call edges'):
            edge_overlap(*pair)
    for wrong in (LINES*255, LINES[0], LINES.bool()):
        with pytest.raises(ValueError, match='from 0 to 1'):
            edge_overlap(wrong, wrong)


def test_edge_overlap_by_its_definition():
    "Count, pixel by pixel, which lines have one of the other kind beside them"
    found, wanted = LINES[:1], edges(IMAGES[1:2])
    def share(a, b):
        a, b = (set(map(tuple, x[0, 0].nonzero().tolist())) for x in (a, b))
        return sum(any((i + k, j + n) in b for k in (-1, 0, 1) for n in (-1, 0, 1)) for i, j in a)/len(a)
    p, r = share(found, wanted), share(wanted, found)
    assert edge_overlap(found, wanted).item() == pytest.approx(2*p*r/(p + r), rel=1e-5)


def test_pictures_of_any_float_type_and_size_pass():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_pictures(IMAGES.to(dtype), IMAGES.to(dtype))
        assert torch.equal(edges(IMAGES.to(torch.float64)), LINES.double())
    check_pictures(torch.zeros(1, 4, 7, 9))


THING = 'small', 'red', 'plain', 'ring'


@pytest.mark.parametrize('place, word', [(0, 'huge'), (1, 'teal'), (2, 'shiny'), (3, 'star'), (1, None)])
def test_a_thing_of_other_words_is_refused(place, word):
    with pytest.raises(ValueError, match=f'{word!r} is not a word of the scenes: expected one of '):
        Thing(*THING[:place], word, *THING[place + 1:], 30., 30.)


@pytest.mark.parametrize('things, relation, tone, background, said', [
    (1, None, 'teal', 'plain', "'teal' is not .* dark, light"), (1, None, 'dark', 'dark', "'dark' is not .* plain, gradient"),
    (2, 'beside', 'dark', 'plain', "'beside' is not .* left of"), (0, None, 'dark', 'plain', '0 things'), (2, None, 'dark', 'plain', '2 things'),
    (1, 'above', 'dark', 'plain', '1 things'), (3, 'above', 'dark', 'plain', '3 things')])
def test_a_scene_that_cannot_be_drawn_or_said_is_refused(things, relation, tone, background, said):
    with pytest.raises(ValueError, match=said):
        Scene((Thing(*THING, 30., 30.),)*things, relation, tone, background, 0)
