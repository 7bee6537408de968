"""toybox: a small picture world, the pipeline that draws it, the judge that reads it, and the recipe of both.

    words.py, world.py      what there is, and what may stand in a picture
    shapes.py, render.py    how it looks
    model.py                the pipeline's parts
    recipe/, train.py       how each was trained, and `python -m perfusion.toybox.train`, which made weights/
    judge.py, score.py      the judge, and `python -m perfusion.toybox.score`
    sheets.py               sheets of pictures: `python -m perfusion.toybox.sheets`
    ablate.py               what the choices of the recipe are worth
"""
