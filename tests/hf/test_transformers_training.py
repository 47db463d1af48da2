"""peft and `transformers.Trainer` train the model, and what they save loads elsewhere."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from lumina_mgpt import Pipeline
from lumina_mgpt.hf import LuminaMGPTForConditionalGeneration


def _examples(processor) -> list[dict]:
    random = torch.Generator().manual_seed(0)
    chats = [
        [
            {"role": "user", "content": f"a cat {index}"},
            {
                "role": "assistant",
                "content": [{"type": "image", "image": torch.randint(0, 64, (4, 4), generator=random)}],
            },
        ]
        for index in range(4)
    ]
    encoded = processor.apply_chat_template(chats, tokenize=True, return_labels=True, return_tensors=None)
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "lm_head"]])
def test_adapters_of_peft_train_generate_and_load(hf, tiny_checkpoint, tmp_path, targets):
    processor = hf[1]
    model = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    batch = processor.pad(_examples(processor))
    optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(adapted(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = processor("a cat", generation_mode="image", height=32, width=32)
    drawn = adapted.eval().generate(**inputs, generation_mode="image", seed=1)
    base = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_checkpoint)
    assert not base.generate(**inputs, generation_mode="image", seed=1).equal(drawn)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again(**batch).logits, adapted(**batch).logits)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = Pipeline.from_pretrained(tmp_path / "merged", text=True).model
    ids = batch["input_ids"][:1]
    torch.testing.assert_close(loaded.project(loaded(ids)), merged(ids).logits)
    assert not loaded.project(loaded(ids)).allclose(hf[0](ids).logits.float(), atol=1e-3)


def test_the_trainer_lowers_the_loss_and_saves_a_checkpoint(hf, tiny_checkpoint, tmp_path):
    processor = hf[1]
    model = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_checkpoint)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        model, arguments, data_collator=processor.pad, train_dataset=_examples(processor), processing_class=processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    expected = model(**processor.pad(_examples(processor))).loss
    assert abs(trainer.evaluate(_examples(processor))["eval_loss"] - float(expected)) < 1e-4
    pipeline = Pipeline.from_pretrained(tmp_path / "run" / "checkpoint-10")
    assert pipeline.model.layers[1].mlp.up_proj.weight.equal(model.model.layers[1].mlp.up_proj.weight)
