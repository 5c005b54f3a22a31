"""The lines of docs/models.md that a notebook would hold, executed on a finished run."""

import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_lines_for_a_notebook_run_and_say_what_the_comments_say(exported_run, capsys):
    (code,) = re.findall(r"## In a notebook\n.*?```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert code.count('"runs/digits"') == 1
    names = {}
    exec(code.replace('"runs/digits"', repr(str(exported_run.folder))), names)  # our own document
    model, q = names["model"], names["q"]
    assert q.loc.shape == q.scale.shape == (5, model.latent_dim)
    printed = capsys.readouterr().out
    assert f"torch.Size([3, {', '.join(map(str, model.shape))}])" in printed
    log_prob = model.log_prob(names["x"], samples=100)
    assert log_prob.shape == (5,)
    assert torch.isfinite(log_prob).all()
