"""Several users ask about one long document: the first reads it, the others find it in the prefix cache.

Start a server first: tokenselect serve --max-model-len 32768
Then: python examples/vllm_openai_client.py DOCUMENT.txt "first question" "second question"
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
document, *questions = sys.argv[1:]
text = Path(document).read_text(encoding="utf-8")


def ask(question: str) -> str:
    """The answer, streamed; with the time to its first piece."""
    start, first, pieces = time.perf_counter(), None, []
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{text}\n\n{question}"}],
        max_tokens=64,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": {"tokenselect_k": 512}},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.perf_counter() - start
            pieces.append(event.choices[0].delta.content)
    return f"{question}\n  {''.join(pieces)}\n  first piece after {first or 0:.2f} s"


print(ask(questions[0]))
with ThreadPoolExecutor() as users:
    for answer in users.map(ask, questions[1:]):
        print(answer)
