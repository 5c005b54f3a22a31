"""The numbers of the service's shape, of a small one that was made to be counted."""

from bench.structure import circles, main, of_packages

FILES = {
    "service/__init__.py": "",
    "service/low/__init__.py": '"""Low."""\n',
    "service/low/a.py": "from service.low import b\n\n\ndef one():\n    return b\n",
    "service/low/b.py": "def two():\n    from service.low import a\n    from service.high import c\n\n    return a\n",
    "service/high/__init__.py": "",
    "service/high/c.py": "import service.low.a\n",
    "pyproject.toml": '[[tool.importlinter.contracts]]\nname = "no torch"\ntype = "forbidden"\n\n'
    '[[tool.importlinter.contracts]]\nname = "layers"\ntype = "layers"\nlayers = ["high", "low"]\n',
}


def test_lines_files_layers_and_circles_are_counted(tmp_path, capsys):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    main([str(tmp_path)])
    told = capsys.readouterr().out
    assert "lines of service/: 12 in 6 files" in told
    assert "longest file: service/low/a.py, 5 lines" in told
    assert "functions: median 4 lines, longest 5" in told
    assert "layers of the import contract: 2" in told
    assert "service 1, service/high 2, service/low 3" in told
    assert "circles among modules: 2\n    service.high.c → service.low.a → service.low.b → service.high.c\n" in told
    assert "\n    service.low.a → service.low.b → service.low.a\n" in told
    assert "circles among packages: 1\n    service.high → service.low → service.high" in told


def test_no_circle_is_no_circle():
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []
    assert circles({"a": {"a"}}) == [["a", "a"]]


def test_what_a_package_imports_of_itself_is_no_circle_of_packages():
    found = {
        "service.low.a": {"service.low.b"},
        "service.low.b": {"service.low.a"},
        "service.high.c": {"service.low.a"},
    }
    assert circles(of_packages(found)) == []
    assert of_packages(found) == {"service.low": set(), "service.high": {"service.low"}}
