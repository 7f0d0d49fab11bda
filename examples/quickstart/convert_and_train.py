"""Put a mixture of softmaxes on a causal LM, fine-tune it, save it, load it again and generate.

python examples/quickstart/convert_and_train.py         makes a small Llama first: no download, half a minute
python examples/quickstart/convert_and_train.py gpt2    takes any causal LM: a folder or a Hub id
"""

import sys

import transformers
from python_documentation import python_documentation
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_mos import MoSForCausalLM

OUT = "quickstart-model"
texts = python_documentation(max_documents=2000)


def small_llama(folder: str) -> str:
    """Saves a Llama with random weights, and a tokenizer, to a folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<end>"], show_progress=False)
    special = {"eos_token": "<end>", "pad_token": "<end>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=2048, bos_token_id=0, eos_token_id=0, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


softmax_model = sys.argv[1] if len(sys.argv) > 1 else small_llama(f"{OUT}/softmax")
tokenizer = AutoTokenizer.from_pretrained(softmax_model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
model = MoSForCausalLM.from_causal_lm(softmax_model)  # its predictions are those of the softmax

trainer = Trainer(
    model,
    TrainingArguments(OUT, max_steps=100, learning_rate=3e-3, save_strategy="no", dataloader_pin_memory=False),
    train_dataset=[tokenizer(text, truncation=True, max_length=64) for text in texts],
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # weights, the code of the head, tokenizer

model = AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)  # loads where hf_mos is not installed too
inputs = tokenizer("Return a new", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=30, no_repeat_ngram_size=2)  # so short a training repeats itself
print(tokenizer.decode(tokens[0]))
