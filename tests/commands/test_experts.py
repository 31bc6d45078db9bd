"""scripts/experts.py on a trained run."""

import json

from scripts import experts


def test_it_prints_a_row_for_each_layer_and_writes_the_page(run_main, text_file, capsys):
    _, run, _, _ = run_main()
    capsys.readouterr()
    assert experts.main([str(run), "--tokens", "500", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = out.splitlines()
    assert rows[0].startswith("layer  busiest / mean")
    assert [row.split()[0] for row in rows[1:3]] == ["0", "1"]
    assert "%" in rows[1], "routes kept since the checkpoint before"
    assert "480 tokens of validation" in out
    assert "since the checkpoint of step 8" in out
    assert "Layer 1" in (run / "routing.html").read_text()
    page = run / "elsewhere.html"
    arguments = [str(run), str(text_file), "--tokens", "64", "--json", "--drop", "2", "--page", str(page)]
    assert experts.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["texts"] == [str(text_file)]
    assert record["tokens"] == 64
    for layer in record["layers"]:
        assert sum(layer["loads"][str(text_file)]) == 2 * 64
        assert len(layer["loss_without"]) == 2
        assert len(layer["favourites"]) == len(layer["together"]) == 4
    assert page.exists()


def test_what_cannot_be_shown_is_refused_in_one_line(run_main, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("few words")
    _, run, _, _ = run_main()
    _, dense, _, _ = run_main("moe.num_experts=1", "moe.top_k=1", folder="dense")
    _, hashed, _, _ = run_main("moe.router=hash", folder="hash")
    capsys.readouterr()
    for arguments, message in {
        (str(dense),): "RUN: is a dense model",
        (str(tmp_path),): "RUN: ",
        (str(hashed),): "--drop: moe.router=hash cannot leave an expert out",
        (str(run), "--drop", "-1"): "--drop: should be at least 0, got -1",
        (str(run), str(tmp_path / "short.txt")): f"{tmp_path}/short.txt: has 10 tokens; a window takes 32",
        (str(run), "--page", str(tmp_path / "nowhere" / "page.html")): "--page: ",
    }.items():
        assert experts.main(list(arguments)) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1
    assert experts.main([str(hashed), "--drop", "0", "--tokens", "64"]) == 0
