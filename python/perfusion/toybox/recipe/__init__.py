"""How each part of toybox was trained; `python -m perfusion.toybox.train` runs them in order."""
