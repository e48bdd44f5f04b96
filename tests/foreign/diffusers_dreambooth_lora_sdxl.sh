accelerate launch train_dreambooth_lora_sdxl.py \
  --pretrained_model_name_or_path="./models/xl" \
  --pretrained_vae_model_name_or_path="./models/vae-fix" \
  --instance_data_dir="./data/dog" --output_dir="./output/dog-xl" \
  --mixed_precision="bf16" --instance_prompt="a photo of sks dog" \
  --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 --rank=8 --use_dora --lr_scheduler="constant" --lr_warmup_steps=0 \
  --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0"
