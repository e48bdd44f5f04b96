export MODEL_NAME="./models/v1-5"
export OUTPUT_DIR="./output/naruto"

accelerate launch --mixed_precision="fp16" train_text_to_image_lora.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --train_data_dir="./data/pictures" --caption_column="text" \
  --resolution=512 --random_flip --center_crop \
  --train_batch_size=1 --gradient_accumulation_steps=4 \
  --max_train_steps=15000 --checkpointing_steps=500 \
  --learning_rate=1e-04 --max_grad_norm=1 \
  --lr_scheduler="cosine" --lr_warmup_steps=0 \
  --snr_gamma=5.0 --dataloader_num_workers=8 \
  --output_dir=${OUTPUT_DIR} --report_to=wandb \
  --validation_prompt="a ninja with blue eyes" --seed=1337
