"""Chat templates in the forms of well-known models, and conversations for them. Written for the tests.

FORMS mark their answers with generation blocks; `plain` takes the marks out, so that a template can be read both ways.
"""

FORMS = {
    "llama2": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if system and loop.first %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m.content | trim }} [/INST]{% else %}"
        "{% generation %} {{ m.content | trim }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'system' %}{{ raise_exception('no system turn') }}"
        "{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token + '\\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}ASSISTANT:{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "smollm2": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}

# As Qwen3's: a thought, an empty one too, stands before the last answer alone.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# As Llama 3's first release: add_generation_prompt is not read.
APPENDING = FORMS["llama3"].replace("{% if add_generation_prompt %}", "{% if true %}")


def plain(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def talk(*turns: str, system: str = "") -> list[dict]:
    roles = ("user", "assistant") * len(turns)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


TALKS = {
    "one turn": talk("What is the sky?", "Blue it is."),
    "three turns": talk("Hi there", "Hello!", "And  now?", "Nothing — é 😀.", "Bye", "So long\n"),
    "a system turn": talk("Name a colour.", "Blue", "Another", "Red", system="Be brief."),
    "answers that begin with newlines": talk("Write", "\n\nOnce upon", "More", "\nThe end", "Again", "\n \nYes"),
    "special tokens in the text": talk("What is </s> for?", "The end <s>of it</s>", "Ok <|im_end|>", "Yes"),
    "spaces at the borders": talk(" a ", " b", "c ", "  d  "),
}
