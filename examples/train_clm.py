"""Fine-tunes a causal language model with a mixture of softmaxes for its head: `hf-mos train`, for launchers.

    python examples/train_clm.py --model gpt2 --train-file book.txt --output-dir out
    accelerate launch examples/train_clm.py --model Qwen/Qwen3-0.6B-Base \
        --dataset-name Salesforce/wikitext --dataset-config-name wikitext-103-raw-v1 \
        --bf16 --learning-rate 1e-4 --per-device-train-batch-size 4 --output-dir out

`hf_mos/tools/train.py` is the script itself, to read and to change. In short it is

    model = MoSForCausalLM.from_causal_lm("gpt2")
    trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[StopOnNonFiniteLoss()])
    MixtureUsage().add_to(trainer)
    trainer.train()
"""

from hf_mos.tools.train import main

if __name__ == "__main__":
    main()
