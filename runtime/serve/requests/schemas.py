"""The bodies of requests, checked strictly: what is not understood is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bilevel.errors import ContextTooLong
from bilevel.runtime.generate.sampling import SamplingParams
from bilevel.runtime.serve.requests.habits import ChatHabits, Habits, StreamHabits, Strict
from bilevel.runtime.serve.requests.messages import FIRST_ERROR, MOST_TOOLS, SOME, FunctionTool, Message, ToolChoice
from bilevel.runtime.serve.requests.structured import Choice, ResponseFormat, StructuredOutputs

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS, MOST_TENSORS = 16, 20, 16, 16
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], FIRST_ERROR]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[Number, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Limit = Annotated[int, Field(ge=-1, lt=2**31)]  # of tokens; -1 for as many as there is room for
MOST_BIASES = 1024


def _warm(temperature: float) -> float:
    """A temperature so low that dividing by it overflows is none."""
    return temperature if temperature >= 1e-6 else 0.0


class StreamOptions(StreamHabits):
    """include_usage: the last event carries the counts."""

    include_usage: bool | None = False


class Sampling(Habits):
    """What completions and chat have in common. top_k, min_p, repetition_penalty, ignore_eos and routes are not OpenAI's."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=MOST_BIASES)] | None = None
    ignore_eos: bool | None = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Literal[""] | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    routes: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None

    def params(self, max_tokens: int) -> SamplingParams:
        """As the scheduler takes them, without the stop texts: it knows token ids only."""
        return SamplingParams(
            temperature=_warm(1.0 if self.temperature is None else self.temperature),
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            max_tokens=max_tokens,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts; none where an empty text was given."""
        if not self.stop:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Sampling):
    """POST /v1/completions. echo: the answer begins with the prompt, whose tokens have log-probabilities too."""

    prompt: str | Annotated[Tokens, SOME] | Annotated[list[str], SOME, FIRST_ERROR] | Annotated[list[Tokens], SOME, FIRST_ERROR]
    max_tokens: Limit | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = False
    suffix: Literal[""] | None = None


class ChatRequest(Sampling, ChatHabits):
    """POST /v1/chat/completions. chat_template: the name of one of the model's. chat_template_kwargs: what it sees besides.

    reasoning_effort: for templates that know it; "none" also switches enable_thinking off.
    """

    messages: Annotated[list[Message], SOME, FIRST_ERROR]
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS), FIRST_ERROR] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TensorParameters(Strict):
    """binary_data_size: bytes of this tensor behind the JSON. binary_data: send this output like that."""

    binary_data_size: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    binary_data: bool | None = None


class InputTensor(Strict):
    """One tensor of a KServe request; data flat or nested."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES", "INT64", "INT32"]
    data: list[Any] | None = None
    parameters: TensorParameters = TensorParameters()


class OutputTensor(Strict):
    """One tensor that is wanted."""

    name: str
    parameters: TensorParameters = TensorParameters()


class InferParameters(Strict):
    """How to generate, as ``bilevel run`` takes it; binary_data_output: all outputs that do not say otherwise as bytes.

    max_tokens: where it is not given, 128 or as many as there is room for.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    binary_data_output: bool = False

    def params(self, num_prompt: int, row_tokens: int) -> SamplingParams:
        """As the scheduler takes them for a prompt of ``num_prompt`` tokens. Raises ContextTooLong where it does not fit."""
        room = check_budget(num_prompt, self.max_tokens, row_tokens)
        given = self.model_dump(exclude={"binary_data_output", "max_tokens"}) | {"temperature": _warm(self.temperature)}
        return SamplingParams(**given, max_tokens=min(room, self.max_tokens or SamplingParams().max_tokens))


class InferRequest(Strict):
    """POST /v2/models/{model}/infer."""

    id: str | None = None
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=MOST_TENSORS), FIRST_ERROR]
    outputs: Annotated[list[OutputTensor], Field(max_length=MOST_TENSORS), FIRST_ERROR] | None = None


def check_budget(num_prompt: int, max_tokens: int | None, row_tokens: int) -> int:
    """Tokens that may be generated. Raises ContextTooLong where prompt and text do not fit a row."""
    if num_prompt > row_tokens or num_prompt + (max_tokens or 1) > row_tokens + 1:
        asked = f" and {max_tokens} were asked for" if max_tokens else ""
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens{asked}, but this server holds {row_tokens} in all; shorten it or ask for fewer"
        )
    return max_tokens or row_tokens + 1 - num_prompt
