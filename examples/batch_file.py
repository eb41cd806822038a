"""A file of requests in OpenAI's batch format, answered by `glm4lite batch`, and its answers put beside the questions.

    python examples/batch_file.py                                        # the embedded `nano`
    python examples/batch_file.py zai-org/GLM-4-9B-0414 jobs             # a 9B; the files stay in the folder jobs

Stop it and run it again with the same folder: what is answered is not asked again. The same file can be sent to OpenAI
or to another server that takes batches, with that one's model in each body.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTIONS = {
    "greeting": "Hello!",
    "name": "Who are you?",
    "abilities": "What can you do?",
    "thanks": "Thank you very much, that helped.",
}


def write_requests(path: Path, model: str) -> None:
    """One line for each question; its custom_id is how the answer is found again."""
    with path.open("w", encoding="utf-8") as file:
        for custom_id, question in QUESTIONS.items():
            body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
            line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_answers(path: Path) -> dict[str, str]:
    """By custom_id; lines come in the order in which answers completed."""
    found = {}
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["error"]:  # it was no request
                found[str(line["custom_id"])] = line["error"]["message"]
            elif line["response"]["status_code"] != 200:  # the request was refused
                found[line["custom_id"]] = line["response"]["body"]["error"]["message"]
            else:
                found[line["custom_id"]] = line["response"]["body"]["choices"][0]["message"]["content"]
    return found


def run(model: str, folder: Path) -> None:
    requests, answers = folder / "requests.jsonl", folder / "answers.jsonl"
    # Requests name a model as the server would: a folder by its last name, a repository as it is.
    write_requests(requests, Path(model).resolve().name if Path(model).is_dir() else model)
    command = [sys.executable, "-m", "glm4lite", "batch", str(requests), str(answers), "--model", model]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3):  # 3: it came to the end, and some lines are errors
        sys.exit(code)
    found = read_answers(answers)
    for custom_id, question in QUESTIONS.items():
        print(f"{custom_id:10} {question:36} {found[custom_id]}")


def main(model: str = "nano", folder: str | None = None) -> None:
    if folder is not None:
        Path(folder).mkdir(exist_ok=True)
        run(model, Path(folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(model, Path(temporary))


if __name__ == "__main__":
    main(*sys.argv[1:])
