accelerate launch train_dreambooth.py \
  --pretrained_model_name_or_path="./models/v1-5" \
  --instance_data_dir="./data/dog" --class_data_dir="./data/dogs" \
  --output_dir="./output/dog" \
  --with_prior_preservation --prior_loss_weight=1.0 \
  --instance_prompt="a photo of sks dog" --class_prompt="a photo of dog" \
  --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing \
  --use_8bit_adam --learning_rate=2e-6 --lr_scheduler="constant" --lr_warmup_steps=0 \
  --num_class_images=4 --max_train_steps=800 --mixed_precision="no"
