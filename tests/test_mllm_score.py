"""Scores of files of answers and captions."""

import json

import pytest

from vision_attn.mllm import score
from vision_attn.mllm.metrics import pope_questions, read_pope


def run(capsys, *args):
    code = score.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


COCO = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
    "annotations": [
        {"image_id": 1, "category_id": 7},
        {"image_id": 2, "category_id": 9},
        {"image_id": 1, "category_id": 7},
    ],
}
HUMAN = {"annotations": [{"image_id": 1, "caption": "a woman walks her dog"}, {"image_id": 1, "caption": "two dogs"}]}


def test_pope_from_pictures_to_scores(capsys, file):
    shown = {f"{i}.jpg": [f"o{(i + j) % 9}" for j in range(4)] for i in range(12)}
    code, out, _ = run(capsys, "questions", file("objects.json", shown), "--split", "popular", "--images", 5)
    path = file("pope.jsonl", out)
    assert code == 0 and read_pope(path) == pope_questions(shown, "popular", images=5)
    answers = "\n".join(json.dumps({"answer": "No." if i % 3 else "yes"}) for i in range(30))
    code, out, _ = run(capsys, "pope", path, file("answers.jsonl", answers))
    labels = [i % 2 == 0 for i in range(30)]
    assert json.loads(out)["accuracy"] == sum((i % 3 == 0) == labels[i] for i in range(30)) / 30
    code, _, err = run(capsys, "pope", path, file("answers.jsonl", answers.split("\n")[0]))
    assert code == 2 and "1 answers for 30 questions" in err
    code, _, err = run(capsys, "pope", path, file("answers.jsonl", '{"text": "no"}'))
    assert code == 2 and "line 1: not a JSON object with answer" in err


def test_chair_with_files_of_coco(capsys, file):
    table = file("synonyms.txt", "person, woman\ndog, puppy\ncat\n")
    captions = [{"image_id": 1, "caption": "A woman, a puppy and a cat."}, {"image_id": 2, "caption": "a cat"}]
    call = "--synonyms", table, "--objects", file("instances.json", COCO)
    code, out, _ = run(capsys, "chair", file("c.json", captions), *call, "--human", file("human.json", HUMAN))
    scores = json.loads(out)
    assert code == 0 and (scores["chair_i"], scores["chair_s"], scores["recall"]) == (1 / 4, 1 / 2, 1)
    plain = {str(one["image_id"]): one["caption"] for one in captions}
    code, out, _ = run(capsys, "chair", file("c.json", plain), *call)
    assert json.loads(out)["chair_i"] == 2 / 4  # nobody said that there is a person
    code, _, err = run(capsys, "chair", file("c.json", {"8": "a cat"}), *call)
    assert code == 2 and "no truth for image '8'" in err
    code, _, err = run(capsys, "chair", file("c.json", "{"), *call)
    assert code == 2 and "is no JSON" in err
    code, _, err = run(capsys, "chair", file("c.json", [{"id": 3}]), *call)
    assert code == 2 and "needs image_id and caption" in err


def test_mme_folder(capsys, file, tmp_path):
    file("count.txt", "a\tq\tYes\tYes\na\tq\tNo\tYes\n")
    code, out, _ = run(capsys, "mme", tmp_path)
    assert code == 0 and json.loads(out) == {"count": 50.0}
    code, _, err = run(capsys, "mme", tmp_path / "nothing")
    assert code == 2 and "no file TASK.txt" in err


def test_amber_files(capsys, file):
    responses = [
        {"id": 1, "response": "a hound and a boat under the sky"},
        {"id": 2, "response": "No"},
        {"id": 3, "response": "Yes"},
    ]
    annotations = [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["boat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "no"},
    ]
    relation = {"dog": [], "boat": [], "hound": [], "sky": []}
    call = [file("r.json", responses), "--annotations", file("a.json", annotations)]
    call += ["--relation", file("rel.json", relation), "--safe", file("safe.txt", "sky\n")]
    code, out, _ = run(capsys, "amber", *call)
    scores = json.loads(out)
    assert code == 0 and scores["generative"] == {"chair": 2 / 3, "cover": 0, "hal": 1, "cog": 1}
    assert scores["discriminative"]["accuracy"] == 0.5 and scores["discriminative"]["recall"] == 0.5
    assert scores["discriminative-hallucination"]["accuracy"] == 1
    code, out, _ = run(capsys, "amber", *call, "--similar", file("s.tsv", "dog\thound\t0.85\n"))
    assert json.loads(out)["generative"] == {"chair": 1 / 3, "cover": 1, "hal": 1, "cog": 1}
    code, _, err = run(capsys, "amber", file("r.json", [{"id": 8, "response": ""}]), *call[1:])
    assert code == 2 and "no entry for response 8" in err
    code, _, err = run(capsys, "amber", file("r.json", [{"response": ""}]), *call[1:])
    assert code == 2 and "an entry has no 'id'" in err
