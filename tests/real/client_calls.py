"""What other people's clients do with a server, one client a function: ``python client_calls.py NAME URL MODEL``.

Runs in an environment of its own (``make real`` makes it in build/clients), for these packages bring two hundred others.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    is_capital: bool
    population: int = Field(ge=1, le=99_999_999)


QUESTION = "What is the capital of France? Answer in one word."
MANY = 120  # tokens: enough for every answer that has to be whole


def langchain_openai(url: str, model: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def lookup(city: Literal["Paris", "Rome"]) -> str:
        """Look a city up."""
        return f"{city} is large."

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=MANY, max_retries=0)
    assert "Paris" in chat.invoke(QUESTION).text
    assert "Paris" in "".join(chunk.text for chunk in chat.stream(QUESTION))
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(City, method=method).invoke("Tell me of Paris.")
        assert isinstance(found, City), (method, found)
    bound = chat.bind_tools([lookup], tool_choice="required", parallel_tool_calls=False)
    asked = [HumanMessage("Look Paris up.")]
    answer = bound.invoke(asked)
    (call,) = answer.tool_calls
    assert call["name"] == "lookup" and call["args"]["city"] in ("Paris", "Rome")
    merged = None
    for chunk in bound.stream(asked):
        merged = chunk if merged is None else merged + chunk
    assert merged is not None and merged.tool_calls[0]["args"] == call["args"]
    result = ToolMessage(lookup.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([lookup]).invoke([*asked, answer, result]).text


def litellm(url: str, model: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched
    import litellm as library

    given = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": MANY}
    asked = [{"role": "user", "content": QUESTION}]
    answer = library.completion(messages=asked, **given)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 0
    again = library.completion(messages=[*asked, answer.choices[0].message.model_dump(), *asked], **given)
    assert again.choices[0].message.content
    stream = library.completion(messages=asked, stream=True, **given)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    found = library.completion(messages=asked, response_format=City, **given)
    City.model_validate_json(found.choices[0].message.content)
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": parameters}}]
    called = library.completion(messages=asked, tools=tools, tool_choice="required", parallel_tool_calls=False, **given)
    message = called.choices[0].message
    assert called.choices[0].finish_reason == "tool_calls" and message.tool_calls[0].function.name == "lookup"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is large."}
    final = library.completion(messages=[*asked, message.model_dump(), result], tools=tools, **given)
    assert final.choices[0].message.content


def llama_index(url: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def lookup(city: str) -> str:
        """Look a city up."""
        return f"{city} is large."

    chat = OpenAILike(
        model=model, api_base=url, api_key="none", temperature=0, max_tokens=MANY, is_chat_model=True,
        is_function_calling_model=True, context_window=2048, max_retries=0,
    )  # fmt: skip
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert "Paris" in (chat.chat(asked).message.content or "")
    assert "Paris" in "".join(chunk.delta or "" for chunk in chat.stream_chat(asked))
    tool = FunctionTool.from_defaults(lookup)
    answer = chat.chat_with_tools([tool], user_msg="Look Paris up.", tool_required=True, allow_parallel_tool_calls=False)
    (call,) = chat.get_tool_calls_from_response(answer)
    assert call.tool_name == "lookup" and isinstance(call.tool_kwargs["city"], str)
    assert isinstance(chat.structured_predict(City, _prompt("Tell me of Paris.")), City)


def _prompt(text: str) -> object:
    from llama_index.core.prompts import PromptTemplate

    return PromptTemplate(text)


def instructor(url: str, model: str) -> None:
    import instructor as library
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for mode in (library.Mode.TOOLS, library.Mode.JSON_SCHEMA):
        patched = library.from_openai(client, mode=mode)
        found = patched.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Tell me of Paris."}], response_model=City,
            max_tokens=MANY, temperature=0, max_retries=1,
        )  # fmt: skip
        assert isinstance(found, City), mode


if __name__ == "__main__":
    name, url, model = sys.argv[1:]
    globals()[name](url, model)
    print("passed")
