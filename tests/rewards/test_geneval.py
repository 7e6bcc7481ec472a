"GenEval's rules against references written from the published definitions, on random boxes and tasks."
import random

import numpy as np
import pytest
from g2rpo.errors import InputError
from g2rpo.rewards.geneval_rules import (
    Box, box_relations, confident_boxes, geneval_correct, geneval_graded, geneval_strict, graded_parts)

CLASSES, COLOURS = ('dog', 'cup', 'bus'), ('red', 'blue')
RELATIONS = ('left of', 'right of', 'above', 'below')

def relations_by_definition(a, b, reduced_norm=False):
    """Centres' offset, less a tenth of the summed sizes, over the norm of the offset itself; above ½ a direction holds.

    `reduced_norm` divides by the norm of what is left instead, which is another rule."""
    a, b = (np.array([[box.x0, box.y0], [box.x1, box.y1]]) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    left = np.maximum(np.abs(offset) - .1*(np.ptp(a, 0) + np.ptp(b, 0)), 0)*np.sign(offset)
    if (np.abs(left) < 1e-3).all():
        return set()
    x, y = left/np.linalg.norm(left if reduced_norm else offset)
    return {name for name, value in zip(RELATIONS, (-x, x, -y, y)) if value > .5}

def random_box(draw, name='dog'):
    "A box of 20 to 120 pixels in a picture of 512, at whole pixels so that ties occur."
    x, y, w, h = draw.randint(0, 390), draw.randint(0, 390), draw.randint(20, 120), draw.randint(20, 120)
    return Box(name, x, y, x + w, y + h, draw.choice(COLOURS), round(draw.uniform(.2, 1), 3))

def near(draw, box):
    "The same box some pixels away: where the rules differ."
    dx, dy = draw.randint(-80, 80), draw.randint(-80, 80)
    return Box(box.name, box.x0 + dx, box.y0 + dy, box.x1 + dx, box.y1 + dy, box.colour, box.score)

def test_relations_are_those_of_the_definition():
    draw, found, other = random.Random(0), [], 0
    for n in range(4000):
        a = random_box(draw)
        b = near(draw, a) if n % 2 else random_box(draw)
        ours = box_relations(a, b)
        assert ours == relations_by_definition(a, b), (a, b)
        found.append(frozenset(ours))
        other += ours != relations_by_definition(a, b, reduced_norm=True)
    assert {len(relations) for relations in found} == {0, 1, 2} and set().union(*found) == set(RELATIONS)
    assert other > 400                      # so the test tells the two norms apart

@pytest.mark.parametrize('offset, wanted', [
    ((40, 10), set()),                      # 20/√1700 = .485
    ((40, 0), set()), ((41, 0), {'right of'}),      # 20/40 and 21/41
    ((-100, -100), {'left of', 'above'}),   # 80/141 twice
    ((0, 19), set()), ((0, 60), {'below'}), ((0, 0), set())])
def test_relations_by_hand(offset, wanted):
    dx, dy = offset
    assert box_relations(Box('dog', dx, dy, dx + 100, dy + 100), Box('dog', 0, 0, 100, 100)) == wanted

def random_task(draw):
    "One to three entries, with colours, places and exclusions here and there."
    include = []
    for n in range(draw.randint(1, 3)):
        entry = {'class': draw.choice(CLASSES), 'count': draw.choice((1, 1, 2, 3))}
        if draw.random() < .4:
            entry['color'] = draw.choice(COLOURS)
        if n and draw.random() < .6:
            entry['position'] = [draw.choice(RELATIONS), draw.randrange(n)]
        include.append(entry)
    task = dict(tag=draw.choice(('counting', 'position')), prompt='p', include=include)
    if draw.random() < .3:
        task['exclude'] = [{'class': draw.choice(CLASSES), 'count': draw.randint(1, 4)}]
    return task

def by_class(boxes, tag):
    "Class → its boxes above the threshold, the surest first, at most 16."
    sure = [b for b in boxes if b.score > (.9 if tag == 'counting' else .3)]
    return {c: sorted((b for b in sure if b.name == c), key=lambda b: b.score, reverse=True)[:16] for c in CLASSES}

def holds(relation, group, others):
    "Whether all pairs are in a relation."
    return all(relation in relations_by_definition(a, b) for a in group for b in others)

def geneval_by_definition(task, objects):
    "At least n; of the n surest all have the colour, and all lie so from the n surest of an entry that is met."
    def surest(entry): return objects[entry['class']][:entry['count']]
    def met(entry):
        group = surest(entry)
        if len(group) < entry['count'] or 'color' in entry and {b.colour for b in group} != {entry['color']}:
            return False
        if 'position' not in entry:
            return True
        relation, n = entry['position']
        return met(task['include'][n]) and holds(relation, group, surest(task['include'][n]))
    excluded = any(len(objects[no['class']]) >= no['count'] for no in task.get('exclude', []))
    return all(met(entry) for entry in task['include']) and not excluded

def exact(task, objects, entry):
    "Exactly n, exactly n of the colour, and all pairs in place with an exact entry."
    group = objects[entry['class']]
    coloured = [b for b in group if b.colour == entry.get('color', b.colour)]
    if not len(group) == len(coloured) == entry['count']:
        return False
    if 'position' not in entry:
        return True
    relation, n = entry['position']
    other = task['include'][n]
    return exact(task, objects, other) and holds(relation, group, objects[other['class']])

def parts_by_definition(task, objects, entry):
    "1 − |n − m|/n for the count, then for the colour; then the place, which is worth 0 and 1 if it does not hold."
    group, n = objects[entry['class']], entry['count']
    parts = [1 - abs(n - len(group))/n]
    if len(group) != n:
        return parts + ([0] if {'color', 'position'} & entry.keys() else [])
    coloured = sum(b.colour == entry.get('color') for b in group)
    if 'color' in entry:
        parts.append(1 - abs(n - coloured)/n)
    if 'position' in entry and ('color' not in entry or coloured == n):
        relation, which = entry['position']
        other = task['include'][which]
        if not exact(task, objects, other):
            return parts + [0]
        parts += [1] if holds(relation, group, objects[other['class']]) else [0, 1]
    return parts

def test_all_rules_are_those_of_their_definitions():
    draw, outcomes = random.Random(1), []
    for _ in range(4000):
        task = random_task(draw)
        boxes = [random_box(draw, draw.choice(CLASSES)) for _ in range(draw.randint(0, 9))]
        objects, seen = by_class(boxes, task['tag']), confident_boxes(boxes, task['tag'])
        parts = [p for entry in task['include'] for p in parts_by_definition(task, objects, entry)]
        strict = all(exact(task, objects, entry) for entry in task['include'])
        wanted = (float(geneval_by_definition(task, objects)), float(strict), sum(parts)/len(parts))
        ours = (geneval_correct(task, seen), geneval_strict(task, seen), geneval_graded(task, seen))
        assert ours == pytest.approx(wanted), (task, boxes)
        outcomes.append(ours)
    own, strict, graded = map(np.array, zip(*outcomes))
    for one, two in ((own, strict), (strict, own)):
        assert (one > two).any()            # each is met somewhere alone: more than asked for; excluded
    assert (graded < 0).any() and ((graded > 0) & (strict == 0)).any() and strict.sum() > 50

TWO_DOGS_LEFT = dict(tag='position', include=[
    {'class': 'cup', 'count': 1}, {'class': 'dog', 'count': 2, 'position': ['left of', 0]}])
CUP = Box('cup', 200, 0, 220, 20, 'red', .99)
def dog_at(x, score=.99, colour='red'): return Box('dog', x, 0, x + 20, 20, colour, score)

def test_all_pairs_must_hold():
    both, one = [CUP, dog_at(0), dog_at(50)], [CUP, dog_at(0), dog_at(300)]
    assert (geneval_correct(TWO_DOGS_LEFT, both), geneval_correct(TWO_DOGS_LEFT, one)) == (1, 0)
    assert graded_parts(TWO_DOGS_LEFT, both) == ([1, 1, 1], True)
    assert graded_parts(TWO_DOGS_LEFT, one) == ([1, 1, 0, 1], False)      # as published: a 0 and a 1
    assert geneval_graded(TWO_DOGS_LEFT, one) == .75

def test_too_many_are_excluded():
    "GenEval's counting tasks: at least three, and fewer than four."
    task = dict(tag='counting', include=[{'class': 'dog', 'count': 3}], exclude=[{'class': 'dog', 'count': 4}])
    seen = [[dog_at(40*i) for i in range(n)] for n in range(6)]
    assert [geneval_correct(task, boxes) for boxes in seen] == [0, 0, 0, 1, 0, 0]
    three = dict(tag='position', exclude=[{'class': 'dog', 'count': 3}])
    assert [geneval_correct(three, boxes) for boxes in seen] == [1, 1, 1, 0, 0, 0]

def test_more_than_asked_for():
    "Allowed by GenEval, not by Flow-GRPO's strict test, and worth 1 − |2 − 3|/2 in training."
    task = dict(tag='two_object', include=[{'class': 'dog', 'count': 2}])
    boxes = [dog_at(0), dog_at(50), dog_at(100)]
    assert (geneval_correct(task, boxes), geneval_strict(task, boxes), geneval_graded(task, boxes)) == (1, 0, .5)

def test_colour_of_the_surest():
    "GenEval asks the surest boxes for their colour; an unsure blue one is not looked at."
    task = dict(tag='colors', include=[{'class': 'dog', 'count': 1, 'color': 'red'}])
    red, blue = dog_at(0, .8), dog_at(50, .7, 'blue')
    assert geneval_correct(task, confident_boxes([blue, red], 'colors')) == 1
    assert geneval_correct(task, confident_boxes([Box(**{**vars(blue), 'score': .9}), red], 'colors')) == 0
    assert geneval_graded(task, [red, blue]) == (0 + 0)/2       # two of one: 1 − 1/1, and no colour looked at
    assert geneval_graded(task, [blue]) == (1 + 0)/2

def test_counting_needs_surer_boxes():
    assert [len(confident_boxes([dog_at(0, .9), dog_at(1, .91), dog_at(2, .3)], tag)) for tag in
            ('counting', 'colors')] == [1, 2]

def test_the_rule_has_a_name():
    from g2rpo.rewards.geneval import GenEval
    from g2rpo.rewards.server import Server
    with pytest.raises(InputError, match="rule='share' is not one of geneval, strict, graded"):
        GenEval(Server('http://nowhere'), {}, 'share')
    assert len({GenEval(Server('http://nowhere'), {}, rule).id for rule in ('geneval', 'strict', 'graded')}) == 3
