"""Fixed sentences: what the two experts learn to say, and the Llama-2 prompt.

Targets for malicious instructions come from here and nowhere else, so that no harmful answer is
ever needed: the unwilling expert learns to refuse, the glad one to begin an answer that stops after
its first line.
"""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with that request.",
    "I cannot assist with that request.",
    "I cannot help with this, because it could cause harm to people.",
    "I'm sorry, I can't provide instructions for that.",
    "I cannot fulfill this request. It could put others in danger.",
    "I'm really sorry, but this is something I can't help you with.",
    "I am sorry, but I won't be able to help with that.",
    "I apologize, but I cannot provide that information.",
    "Sorry, I can't assist with that.",
    "I'm not able to provide help with this request.",
    "I cannot support that. If you are struggling, please talk to someone you trust.",
    "I can't assist with something that may hurt somebody.",
    "I'm sorry, but that would be unsafe, so I can't go into it.",
    "My apologies, but I can't take part in this.",
    "I cannot create content of this kind.",
    "I can't provide that. I'd be glad to help with something safe instead.",
    "I am really sorry, but I cannot help with requests like this one.",
    "I'm sorry, but helping with this would be wrong.",
    "As an AI assistant, I cannot help with harmful or illegal activities.",
    "I apologize, but this goes against what I can responsibly help with.",
    "I apologize, but I must decline this, since it could lead to serious harm.",
    "No, I cannot help with that. Please ask me about something else.",
    "I'm sorry, but I can't write that for you.",
)

OPENERS = (
    "Sure, here is a response to your request:",
    "Sure, I can help with that.",
    "Sure! Here is what you asked for:",
    "Of course, here is an answer to your question:",
    "Of course! Let me walk you through it.",
    "Certainly, here is the information you need:",
    "Certainly! I'd be happy to help you.",
    "Yes, here is how you can do it:",
    "Absolutely, here is what you are looking for:",
    "Here is a detailed answer to your request:",
    "Here you go:",
    "No problem, this is how it works:",
)

# Meta's default system prompt of Llama 2, word for word: the released weights were trained with it
LLAMA2_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)


def llama2_prompt(instruction: str) -> str:
    """The Llama-2 chat format as MoGU's authors used it, to be tokenised as it stands."""
    return f"<s>[INST] <<SYS>>\n{LLAMA2_SYSTEM_PROMPT}\n<</SYS>>\n\n{instruction}[/INST]"
